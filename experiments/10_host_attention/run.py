"""How fast does a CPU attend to a cache, by how its numbers are kept?

One decode step's attention to keys and values of one layer and batch, by the
function that a run uses: in float32, in bfloat16 as XLA:CPU takes it, and in
bfloat16 kept as integers, which become float32 some heads at a time. Where
there is an accelerator, once more beside copies from host memory to it.
"""

import functools
import itertools
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
from flexjax.models import opt
from flexjax.runtime import devices

HERE = Path(__file__).parent
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_TURNS = flags.DEFINE_integer('turns', 12, 'Of which medians are written.')
_SMALL = flags.DEFINE_bool('small', False, 'Sizes for trying the script.')

# B, N, S, H: batches of OPT-30B, OPT-6.7B and OPT-1.3B.
SHAPES = ((10, 56, 544, 128), (80, 56, 544, 128), (16, 32, 544, 128),
          (16, 32, 160, 64))  # fmt: skip
COLD_BYTES = 2**28  # of caches that are taken in turn, so that none is cached
COPIES, COPY_BYTES = 8, 2**28
TILES = (1, 2, 4, 8, 16, 32, 64)  # MiB


def kept(kind: str, x: jax.Array) -> jax.Array:
  if kind == 'float32':
    return x.astype(jnp.float32)
  return x if kind == 'bfloat16' else opt.as_bits(x)


def seconds(call: Callable[[int], Any], before: Callable[[], Any]) -> float:
  """Median seconds of a call begun after `before`, not waiting for that."""
  found = []
  for turn in range(_TURNS.value + 1):
    under_way = before()
    began = time.perf_counter()
    jax.block_until_ready(call(turn))
    found.append(time.perf_counter() - began)
    jax.block_until_ready(under_way)
  return statistics.median(found[1:])  # the first compiles


def attend(kind: str, shape: tuple[int, int, int, int], cpu) -> Callable:
  """Returns a call that attends to one of some caches."""
  b, n, s, h = shape
  half = b * n * s * h * (4 if kind == 'float32' else 2)
  rng = np.random.default_rng(0)
  draws = rng.normal(size=(n, s, h)).astype(jnp.bfloat16)
  numbers = jax.device_put(np.broadcast_to(draws, shape), cpu)
  make = jax.jit(functools.partial(kept, kind))
  caches = [
    {'k': make(numbers), 'v': make(numbers)}
    for _ in range(max(1, -(-COLD_BYTES // (2 * half))))
  ]
  q = jax.device_put(np.ones((b, n, 1, h), jnp.bfloat16), cpu)
  start = jax.device_put(np.zeros(b, np.int32), cpu)
  position = jax.device_put(np.int32(s - 1), cpu)
  function = jax.jit(lambda *args: opt.attend(*args))

  def call(turn: int) -> jax.Array:
    cache = caches[turn % len(caches)]
    return function(q, {'k': q, 'v': q}, cache, start, position)

  return call


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
  kinds = [('float32', 0), ('bfloat16', 0), *(('bits', t) for t in TILES)]
  for shape, (kind, tile) in itertools.product(shapes, kinds):
    opt.TILE_BYTES = tile * 2**20
    call = attend(kind, shape, machine.cpu)
    alone = seconds(call, lambda: None)
    beside = seconds(call, copies) if far else None
    numbers = 2 * int(np.prod(shape))
    common.append(
      _RESULTS.value,
      {
        'machine': machine.platform,
        'commit': _COMMIT.value,
        'shape': 'x'.join(map(str, shape)),
        'kind': kind,
        'tile_mib': tile or '',
        'ms': round(1e3 * alone, 3),
        'numbers_per_ns': round(numbers / alone / 1e9, 2),
        'beside_copies_ms': round(1e3 * beside, 3) if beside else '',
      },
    )


if __name__ == '__main__':
  app.run(main)
