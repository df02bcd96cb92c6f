"""The OPT sizes (Zhang et al., 2022, arXiv 2205.01068, table 1)."""

from flexjax.config import ModelConfig
from flexjax.errors import InputError

#             layers  heads  hidden
_SIZES = {
  '125m': (12, 12, 768),
  '350m': (24, 16, 1024),
  '1.3b': (24, 32, 2048),
  '2.7b': (32, 32, 2560),
  '6.7b': (32, 32, 4096),
  '13b': (40, 40, 5120),
  '30b': (48, 56, 7168),
  '66b': (64, 72, 9216),
  '175b': (96, 96, 12288),
}

NAMES = tuple(f'opt-{size}' for size in _SIZES)


def preset(name: str) -> ModelConfig:
  """Returns the configuration of `opt-125m` ... `opt-175b`.

  Raises:
    InputError: there is no preset of that name.
  """
  size = name.lower().rsplit('/', 1)[-1].removeprefix('opt-')
  if size not in _SIZES:
    raise InputError(
      f"no preset is called '{name}'; there are {', '.join(NAMES)}"
    )
  layers, heads, hidden = _SIZES[size]
  small = size == '350m'  # the one post-layer-norm model of the family
  return ModelConfig(
    num_layers=layers,
    num_heads=heads,
    hidden_size=hidden,
    ffn_size=4 * hidden,
    embed_size=512 if small else hidden,
    pre_layer_norm=not small,
    final_layer_norm=not small,
  )
