"""Do writes of new rows into pinned memory wait for copies to the device?

A decode step of OPT-30B, 10x9, is made of cells that read a cache, compute, and
write a row of it back. Here one cell's parts run alone, and while copies to the
device are under way, by the tier that a run uses and by another way.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import common
from flexjax.runtime import devices
from flexjax.runtime.compute import CACHE_AXIS
from flexjax.tiers.base import At
from flexjax.tiers.host import HostTier

HERE = Path(__file__).parent
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_TURNS = flags.DEFINE_integer('turns', 15, 'Of which medians are written.')
_SMALL = flags.DEFINE_bool('small', False, 'Sizes for trying the script.')

COPIES = 6  # under way at once; of the bytes of a layer's matrix
DTYPE = jnp.bfloat16


class Cell:
  """A cache in pinned memory, rows for it, and something to compute."""

  def __init__(self, batch: int, heads: int, length: int, width: int):
    self.machine = devices.machine()
    shape = (batch, heads, length, 128)
    self.key = ('cache', 0, 0)
    self.tier = HostTier(self.machine.pinned, self.machine.device)
    self.tier.allocate(
      self.key, {x: jax.ShapeDtypeStruct(shape, DTYPE) for x in 'kv'}
    )
    row = np.ones((batch, heads, 1, 128), DTYPE)
    self.rows = self._here({'k': row, 'v': row})
    self.tier.write(self.key, self.rows, At(CACHE_AXIS, 1))
    self.x = self._here(np.ones((batch, width), DTYPE))
    self.w = self._here(np.ones((width, width), DTYPE))
    self.far = [
      jax.device_put(np.ones((2 * width, width), DTYPE), self.machine.pinned)
      for _ in range(COPIES)
    ]
    self.turn = 1
    self._product = jax.jit(lambda x, w: x @ w)

  def _here(self, value):
    return jax.device_put(value, self.machine.device)

  def copies(self) -> Any:
    return [jax.device_put(x, self.machine.device) for x in self.far]

  def compute(self) -> Any:
    return self._product(self.x, self.w)

  def write(self) -> Any:
    """As a run does: the device writes into the pinned array."""
    self.turn += 1
    self.tier.write(self.key, self.rows, At(CACHE_AXIS, self.turn))
    return self.tier.written(self.key)

  def send(self) -> Any:
    """Rows as arrays of their own in pinned memory."""
    return jax.device_put(self.rows, self.machine.pinned)

  def write_then_compute(self) -> Any:
    self.write()
    return self.compute()

  def send_then_compute(self) -> Any:
    self.send()
    return self.compute()


def seconds(act: Callable[[], Any], before: Callable[[], Any]) -> float:
  """Median seconds until what `act` returns is there, started after `before`
  without waiting for that."""
  found = []
  for _ in range(_TURNS.value + 1):
    under_way = before()
    began = time.perf_counter()
    jax.block_until_ready(act())
    found.append(time.perf_counter() - began)
    jax.block_until_ready(under_way)
  return statistics.median(found[1:])  # the first compiles


def main(argv):
  del argv
  sizes = (2, 4, 64, 256) if _SMALL.value else (10, 56, 544, 7168)
  cell = Cell(*sizes)
  acts = {
    'copies': cell.copies,
    'compute': cell.compute,
    'write': cell.write,
    'send': cell.send,
    'write, compute': cell.write_then_compute,
    'send, compute': cell.send_then_compute,
  }
  for name, act in acts.items():
    alone = seconds(act, lambda: None)
    beside = seconds(act, cell.copies)
    common.append(
      _RESULTS.value,
      {
        'act': name,
        'commit': _COMMIT.value,
        'alone_ms': round(1e3 * alone, 3),
        'beside_copies_ms': round(1e3 * beside, 3),
      },
    )


if __name__ == '__main__':
  app.run(main)
