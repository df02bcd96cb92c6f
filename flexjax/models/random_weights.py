"""Weights drawn from a seed, for benchmarks and tests of any model size.

It hides from the runtime that there is no checkpoint. A value depends on the
seed and its place alone, never on dtype, thread or the order of reading.
"""

import functools
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.special import ndtri

from flexjax.config import ModelConfig
from flexjax.models import opt
from flexjax.typing import Piece

_STD = 0.02  # of the checkpoints' own initialisation
_PIECE_ELEMENTS = 8 * 2**20  # 32 MiB of float32


class RandomWeights:
  """A WeightSource of N(0, 0.02) draws; norm scales are 1 + N(0, 0.02).

  Draws are quantiles of the normal distribution picked by 16 random bits:
  five times as fast as a normal generator, which would take half an hour for
  175B parameters.
  """

  def __init__(self, config: ModelConfig, seed: int = 0) -> None:
    self.config = config
    self.fingerprint = f'random-{seed}-{zlib.crc32(repr(config).encode()):x}'
    self._seed = seed
    self._groups = opt.weight_groups(config)

  def pieces(self, group: int, dtype: Any) -> Iterator[Piece]:
    """Yields weight group `group` as pieces of at most 32 MiB, in `dtype`.

    A single row that is larger makes a piece of its own.
    """
    dtype = np.dtype(dtype)
    for name, shape in self._groups[group].items():
      if name == 'vectors':
        yield Piece(name, 0, self._vectors(group).astype(dtype))
        continue
      step = max(1, _PIECE_ELEMENTS // math.prod(shape[1:]))
      for begin in range(0, shape[0], step):
        rows = min(step, shape[0] - begin)
        draws = self._draw(group, name, begin, rows * shape[1], dtype)
        yield Piece(name, begin, draws.reshape(rows, *shape[1:]))
        del draws  # Else it lives on while the next one is drawn.

  def _vectors(self, group: int) -> np.ndarray:
    """Returns the packed vectors of a layer in float32."""
    last = len(self._groups) - 1
    kind = 'head' if group == last else ('attention', 'mlp')[group % 2]
    sizes = opt.vector_sizes(self.config, kind)
    single = np.dtype(np.float32)
    packed = self._draw(group, 'vectors', 0, sum(sizes.values()), single)
    if 'scale' in sizes:
      packed[: sizes['scale']] += 1
    return packed

  def _draw(
    self, group: int, name: str, row: int, count: int, dtype: np.dtype
  ) -> np.ndarray:
    """Returns `count` draws of the piece that starts at `row`."""
    place = (self._seed, group, zlib.crc32(name.encode()), row)
    source = np.random.SFC64(np.random.SeedSequence(place))
    bits = source.random_raw(-(-count // 4)).astype('<u8', copy=False)
    return _quantiles(dtype)[bits.view('<u2')[:count]]


@functools.cache
def _quantiles(dtype: np.dtype) -> np.ndarray:
  """Returns 2**16 equally likely values of N(0, 0.02)."""
  exact = _STD * ndtri((np.arange(2**16) + 0.5) / 2**16)
  return exact.astype(np.float32).astype(dtype)
