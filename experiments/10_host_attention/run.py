"""How fast does a CPU attend to a cache, by the numbers that it holds?

One decode step's attention to keys and values of one layer and batch, and the
write of a row into them, by the functions that a run uses. Where there is an
accelerator, attention once more beside copies from host memory to it.
"""

import itertools
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import common
from flexjax.models import attention
from flexjax.runtime import devices
from flexjax.runtime.compute import CACHE_AXIS
from flexjax.tiers.base import make_updater

HERE = Path(__file__).parent
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_TURNS = flags.DEFINE_integer('turns', 12, 'Of which medians are written.')
_SMALL = flags.DEFINE_bool('small', False, 'Sizes for trying the script.')

# B, N, S, H: batches of OPT-30B, OPT-6.7B, OPT-1.3B and OPT-350M.
SHAPES = ((10, 56, 544, 128), (80, 56, 544, 128), (16, 32, 544, 128),
          (16, 32, 160, 64), (8, 16, 320, 64), (16, 16, 543, 64))  # fmt: skip
DTYPES = ('float32', 'bfloat16', 'float16')
COLD_BYTES = 2**28  # of caches that are taken in turn, so that none is cached
COPIES, COPY_BYTES = 8, 2**28


class Turns(NamedTuple):
  """Milliseconds of calls, and pages that the system had to find for one."""

  fastest: float
  median: float
  faults: int


def time_turns(call: Callable[[int], Any], before=lambda: None) -> Turns:
  """Times calls begun after `before`, not waiting for that."""
  found, faults = [], []
  for turn in range(_TURNS.value + 1):
    under_way = before()
    known = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    began = time.perf_counter()
    jax.block_until_ready(call(turn))
    found.append(1e3 * (time.perf_counter() - began))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - known)
    jax.block_until_ready(under_way)
  del found[0], faults[0]  # the first compiles
  return Turns(
    min(found), statistics.median(found), round(statistics.median(faults))
  )


class Attention:
  """Attention to some caches of a shape in turn, and writes into them."""

  def __init__(self, dtype: str, shape: tuple[int, int, int, int], cpu):
    b, n, s, h = shape
    nbytes = 2 * int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    draws = np.random.default_rng(0).normal(size=(n, s, h)).astype(dtype)
    draws = np.broadcast_to(draws, shape)
    self.caches = [
      {name: jax.device_put(draws, cpu) for name in 'kv'}
      for _ in range(max(1, -(-COLD_BYTES // nbytes)))
    ]
    one = jax.device_put(np.ones((b, n, 1, h), dtype), cpu)
    self.rows = {'k': one, 'v': one}
    self.start = jax.device_put(np.zeros(b, np.int32), cpu)
    self.position = jax.device_put(np.int32(s - 1), cpu)
    self._attend = jax.jit(attention.attend)
    self._update = make_updater(CACHE_AXIS)

  def attend(self, turn: int) -> jax.Array:
    cache = self.caches[turn % len(self.caches)]
    return self._attend(
      self.rows['k'], self.rows, cache, self.start, self.position
    )

  def write(self, turn: int) -> dict[str, jax.Array]:
    at = turn % len(self.caches)
    self.caches[at] = self._update(self.caches[at], self.rows, self.position)
    return self.caches[at]


def main(argv):
  del argv
  machine = devices.machine()
  far = []
  if not machine.unified:
    one = np.ones(COPY_BYTES // 4, np.float32)
    far = [jax.device_put(one, machine.pinned) for _ in range(COPIES)]

  def copies():
    return [jax.device_put(x, machine.device) for x in far]

  shapes = ((2, 4, 24, 8),) if _SMALL.value else SHAPES
  for shape, dtype in itertools.product(shapes, DTYPES):
    measured = Attention(dtype, shape, machine.cpu)
    alone = time_turns(measured.attend)
    beside = time_turns(measured.attend, copies).median if far else None
    numbers = 2 * int(np.prod(shape))
    common.append(
      _RESULTS.value,
      {
        'machine': machine.platform,
        'jax': jax.__version__,
        'commit': _COMMIT.value,
        'shape': 'x'.join(map(str, shape)),
        'dtype': dtype,
        'ms': round(alone.median, 3),
        'fastest_ms': round(alone.fastest, 3),
        'faults': alone.faults,
        'numbers_per_ns': round(numbers / alone.median / 1e6, 2),
        'beside_copies_ms': round(beside, 3) if beside else '',
        'write_ms': round(time_turns(measured.write).median, 3),
      },
    )


if __name__ == '__main__':
  app.run(main)
