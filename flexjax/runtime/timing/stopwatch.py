"""Seconds of one call, and the arrays to call with.

Hides from those who time things that an accelerator computes while it is
given more to do, and that a first call compiles.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from flexjax.runtime.devices import Machine

Call = Callable[[int], Any]
_MOST_RUNS = 20
_FEWEST_RUNS = 3  # of which the median counts
_CHAIN = 20  # calls behind each other; with the head start fewer than 32
_HEAD_START_SECONDS = 6e-3
_HEAD_START_CALLS = 10
_HEAD_START_SIZE = 8192
# More than any cache holds, so that operands come from memory.
_COLD_BYTES = 2**28
_MOST_COPIES = 8
_LEAST = 1e-7  # seconds of anything


class Stopwatch:
  """Times calls on a machine.

  Args:
    seconds: to spend on repeating one call; it is made at least once.

  Attributes:
    room: bytes of the device that whatever is timed may take.
  """

  def __init__(self, machine: Machine, seconds: float):
    self.machine = machine
    self.room = machine.device_memory // 4
    self._seconds = seconds

  def on_device(
    self, call: Call, wait: Callable[[Any], Any] = jax.block_until_ready
  ) -> float:
    """Returns the seconds that the device takes for one call.

    An accelerator is given something else first, so that dispatching the calls
    does not count: what they add to the time of that is theirs. Where that
    seems to be nothing it is tried again, at most `_MOST_RUNS` times in all;
    what is still too little to be seen is `_LEAST`.

    Args:
      call: call(n) for n = 0, 1, 2, ...; may take other operands each time.
      wait: blocks until the call that returned its argument is done.
    """
    if self.machine.platform == 'cpu':
      return self.wall(call, wait)
    jax.block_until_ready(self._head_start())  # compiles
    n = itertools.count()
    wait(call(next(n)))  # compiles
    began = time.perf_counter()
    wait(call(next(n)))
    once = time.perf_counter() - began
    calls = max(1, min(_CHAIN, int(self._seconds / once / 3)))
    added, began = [], time.perf_counter()
    for turn in range(_MOST_RUNS):
      alone = self._after_head_start(lambda: None)
      added.append(
        self._after_head_start(
          lambda: wait(_last(lambda: call(next(n)), calls))
        )
        - alone
      )
      seconds = statistics.median(added) / calls
      enough = time.perf_counter() - began > self._seconds
      if enough and turn + 1 >= _FEWEST_RUNS and seconds > _LEAST:
        break
    return max(seconds, _LEAST)

  def wall(
    self,
    call: Call,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    *,
    patience: float = 1,
  ) -> float:
    """Returns the mean seconds from a call until it is waited for.

    Args:
      call, wait: as of `on_device`.
      patience: how many times as long to repeat it.
    """
    n = itertools.count()

    def run() -> float:
      began = time.perf_counter()
      wait(call(next(n)))
      return time.perf_counter() - began

    run()  # compiles
    return self._mean(run, patience * self._seconds)

  def _mean(self, run: Callable[[], float], enough: float) -> float:
    """Not the least: a long run has its share of bad moments, too."""
    seconds, began = [run()], time.perf_counter()
    while len(seconds) < _MOST_RUNS:
      seconds.append(run())
      if time.perf_counter() - began > enough:
        break
    return max(statistics.fmean(seconds), _LEAST)

  def _after_head_start(self, run: Callable[[], None]) -> float:
    began = time.perf_counter()
    busy = self._head_start()
    run()
    jax.block_until_ready(busy)
    return time.perf_counter() - began

  @functools.cached_property
  def _head_start(self) -> Callable[[], Any]:
    """What gives the device something to do for a few milliseconds."""
    size = (_HEAD_START_SIZE, _HEAD_START_SIZE)
    x, product = self.numbers(size, 'bfloat16'), jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))  # compiles
    began = time.perf_counter()
    jax.block_until_ready(product(x))
    calls = math.ceil(_HEAD_START_SECONDS / (time.perf_counter() - began))
    calls = min(_HEAD_START_CALLS, calls)
    return lambda: _last(lambda: product(x), calls)

  def numbers(
    self, shape: Sequence[int], dtype: Any, home: Sharding | None = None
  ) -> Array:
    """Returns an array of small numbers, on the device or at `home`."""
    array = np.resize(_draws(str(jax.numpy.dtype(dtype))), tuple(shape))
    return jax.block_until_ready(
      jax.device_put(array, home or self.machine.device)
    )

  def integers(self, value: Any, home: Sharding | None = None) -> Array:
    """Returns committed int32, on the device or at `home`."""
    return jax.device_put(
      np.asarray(value, np.int32), home or self.machine.device
    )

  def copies(self, nbytes: int) -> int:
    """How many operands of `nbytes` to take in turn, so that none is cached."""
    count = min(_MOST_COPIES, -(-_COLD_BYTES // nbytes), self.room // nbytes)
    return max(1, count)


def _last(run: Callable[[], Any], count: int) -> Any:
  """Runs it so often and returns the last result, of which others are freed."""
  for _ in range(count):
    result = run()
  return result


@functools.cache
def _draws(dtype: str) -> np.ndarray:
  """An odd number of draws, so that rows differ when it is repeated."""
  draws = np.random.default_rng(0).normal(0, 0.02, 2**16 + 1)
  return draws.astype(np.float32).astype(jax.numpy.dtype(dtype))
