"""Where OPT's tensors are found under Hugging Face's names.

It hides from the checkpoint reader how our few large arrays per layer are put
together from the many small ones of a checkpoint. Both keep matrices as
[out, in], so putting together is always a matter of whole rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

from flexjax.config import ModelConfig
from flexjax.errors import InputError
from flexjax.models import opt
from flexjax.models.tensor_file import LazyTensor

_PREFIXES = ('model.model.decoder.', 'model.decoder.', 'decoder.', 'model.')
# Module that each tensor, or packed vector, comes from.
_MODULES: dict[str, dict[str, tuple[str, ...]]] = {
  'tokens': {'table': ('embed_tokens',)},
  'embed': {'positions': ('embed_positions',), 'project_in': ('project_in',)},
  'attention': {
    'norm': ('self_attn_layer_norm',),
    'qkv': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'out': ('self_attn.out_proj',),
  },
  'mlp': {'norm': ('final_layer_norm',), 'fc1': ('fc1',), 'fc2': ('fc2',)},
  'head': {
    'norm': ('final_layer_norm',),
    'project_out': ('project_out',),
    'table': ('lm_head',),
  },
}


class Part(NamedTuple):
  """Rows of one of our tensors that are a whole tensor of the checkpoint.

  Attributes:
    name: the tensor's name, as `canonical` gives it.
    shape: the shape that the model's configuration asks of it.
  """

  name: str
  shape: tuple[int, ...]


def layout(config: ModelConfig) -> tuple[Mapping[str, list[Part]], ...]:
  """Returns the parts, in order, of each tensor of each weight group."""
  body = [
    (kind, f'layers.{n}.')
    for n in range(config.num_layers)
    for kind in ('attention', 'mlp')
  ]
  kinds = [('tokens', ''), ('embed', ''), *body, ('head', '')]
  groups = opt.weight_groups(config)
  out = []
  for (kind, prefix), shapes in zip(kinds, groups, strict=True):
    group = {}
    for name, shape in shapes.items():
      if name == 'vectors':
        group[name] = _vectors(config, kind, prefix)
        continue
      modules = _MODULES[kind][name]
      part = (shape[0] // len(modules), *shape[1:])
      group[name] = [Part(f'{prefix}{m}.weight', part) for m in modules]
    out.append(group)
  return tuple(out)


def _vectors(config: ModelConfig, kind: str, prefix: str) -> list[Part]:
  """Returns the parts of a layer's packed vectors, in their order."""
  parts = []
  for name, size in opt.vector_sizes(config, kind).items():
    norm = name in ('scale', 'offset')
    modules = _MODULES[kind]['norm' if norm else name]
    leaf = 'weight' if name == 'scale' else 'bias'
    shape = (size // len(modules),)
    parts += [Part(f'{prefix}{m}.{leaf}', shape) for m in modules]
  return parts


def canonical(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Returns the tensors by their names within the decoder.

  Raises:
    InputError: two names differ in their prefix only.
  """
  out: dict[str, LazyTensor] = {}
  for name, tensor in tensors.items():
    prefix = next((p for p in _PREFIXES if name.startswith(p)), '')
    short = name.removeprefix(prefix)
    if short in out:
      raise InputError(
        f"{tensor.path}: tensor '{name}' occurs again as '{out[short].name}'"
      )
    out[short] = tensor
  return out
