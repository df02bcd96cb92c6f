"""A model's name -> its configuration, weights and tokenizer.

Hides whether a model is the bundled one, a directory, a hub id, a preset with
random weights.
"""

import dataclasses
from pathlib import Path

import flexjax.models
from flexjax.config import DTYPE_BYTES, ModelConfig
from flexjax.data.tokenizer import Tokenizer
from flexjax.errors import InputError
from flexjax.models import hub, presets
from flexjax.models.checkpoint import Checkpoint
from flexjax.models.hf_config import read_config
from flexjax.models.random_weights import RandomWeights
from flexjax.runtime.folder import Held, read_manifest
from flexjax.runtime.loading import HeldWeights
from flexjax.typing import WeightSource

BUNDLED = Path(flexjax.models.__file__).parent / 'tiny_opt'


@dataclasses.dataclass(frozen=True)
class Source:
  """A model that can be loaded.

  Attributes:
    tokenizer: None where it has none.
    path: its directory, if it has one.
    held: what that holds, where it is a converted folder.
    random: its weights are draws.
  """

  name: str
  config: ModelConfig
  weights: WeightSource
  tokenizer: Tokenizer | None = None
  path: Path | None = None
  held: Held | None = None
  random: bool = False


def find_source(
  model: str | Path | None, *, random_weights: bool = False, seed: int = 0
) -> Source:
  """Finds and checks a model without reading its weights.

  Args:
    model: a checkpoint directory, a folder that `convert` has written, a hub
      id, with `random_weights` also a preset such as opt-1.3b; None for the
      model that ships with flexjax.
    random_weights: take only the configuration and draw the weights.
    seed: of the random weights.

  Raises:
    InputError: there is no such model, or it is not whole.
  """
  name = str(model or 'bundled tiny OPT')
  preset = str(model).lower().rsplit('/', 1)[-1]
  if random_weights and preset in presets.NAMES and not Path(name).is_dir():
    config = presets.preset(preset)
    return Source(name, config, RandomWeights(config, seed), random=True)
  if model is None:
    path = BUNDLED
  elif not (Path(name) / 'config.json').exists() and (
    held := read_manifest(Path(name))
  ):
    return _held_source(name, held)
  else:
    try:
      path = hub.find_checkpoint(name)
    except InputError as e:
      if preset in presets.NAMES:
        raise InputError(
          f'{e}; for benchmarks the preset {preset} runs with --random_weights'
        ) from None
      raise
  tokenizer = _tokenizer(path)
  if random_weights:
    config = read_config(path / 'config.json')
    drawn = RandomWeights(config, seed)
    return Source(name, config, drawn, tokenizer, path, random=True)
  checkpoint = Checkpoint.open(path)
  return Source(name, checkpoint.config, checkpoint, tokenizer, path)


def _held_source(name: str, held: Held) -> Source:
  """A folder that `convert` has written, as a model of its own."""
  path, specs = Path(name), held.form.specs(held.config)
  if missing := len(set(range(len(specs))) - held.complete):
    raise InputError(
      f"'{name}' lacks {missing} of {len(specs)} weight groups: its conversion "
      'has not ended; run it again'
    )
  weights = HeldWeights(path, held.model, held.complete, specs)
  return Source(name, held.config, weights, _tokenizer(path), path, held)


def _tokenizer(path: Path) -> Tokenizer | None:
  """Returns a directory's tokenizer; without one, prompts are token ids."""
  named = ('tokenizer.json', 'vocab.json', 'merges.txt')
  if any((path / name).exists() for name in named):
    return Tokenizer.open(path)
  return None


def check_dtype(dtype: str) -> None:
  """Raises InputError unless `dtype` is 'auto' or one that is supported."""
  if dtype not in ('auto', *DTYPE_BYTES):
    raise InputError(
      f"dtype must be one of auto, {', '.join(DTYPE_BYTES)}, got '{dtype}'"
    )
