"""Times computing beside transfers."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

from flexjax.runtime.timing import disks, layers
from flexjax.runtime.timing.links import AT_ONCE, DTYPE, ROW, Start, fill
from flexjax.runtime.timing.points import Points
from flexjax.runtime.timing.stopwatch import Call, Stopwatch
from flexjax.tiers.host import HostTier

_TURNS = 7  # runs of which the median counts
_MOST_CALLS = 2000  # of a layer, lest one seem to take no time


def losses(
  watch: Stopwatch, points: Points, disk_dir: Path | None
) -> dict[str, float]:
  """Link -> part of its busy time that computing loses.

  0 where both at once take as long as the longer of them, 1 where they take
  as long as one after the other.
  """
  found = disk_losses(watch, points, disk_dir) if disk_dir else {}
  if not watch.machine.unified:
    found |= _host_losses(watch, points)
  return found


def disk_losses(
  watch: Stopwatch, points: Points, disk_dir: Path
) -> dict[str, float]:
  """`losses` of the links with the disk."""
  call, found = _layer(watch), {}
  with (
    disks.tier_below(watch, disk_dir) as disk,
    disks.rows(watch, disk, points.rewritten[-1]) as start,
  ):
    found['host_to_disk'] = _lost(watch, call, start)
  if watch.machine.unified:
    # A CPU copies caches with the cores that it computes with: measured, it
    # was 0.4 to 1 from one minute to the next.
    return found | {'disk_to_host': 1.0}
  with (
    disks.tier_below(watch, disk_dir) as disk,
    disks.weights(
      watch, disk, points.contending_bytes, points.cold_bytes
    ) as start,
  ):
    found['disk_to_host'] = _lost(watch, call, start)
  return found


def _host_losses(watch: Stopwatch, points: Points) -> dict[str, float]:
  machine, key, call = watch.machine, ('weights', 0), _layer(watch)
  shape = (points.contending_bytes // ROW, ROW // 2)
  tier = HostTier(machine.pinned, machine.device)
  fill(watch, tier, key, shape)
  there = watch.numbers(shape, DTYPE)

  def up():
    moved = [tier.read(key).result() for _ in range(AT_ONCE)]
    return lambda: jax.block_until_ready(moved)

  def down():
    moved = [jax.device_put(there, machine.pinned) for _ in range(AT_ONCE)]
    return lambda: jax.block_until_ready(moved)

  found = {
    'host_to_device': _lost(watch, call, up),
    'device_to_host': _lost(watch, call, down),
  }
  tier.close()
  return found


def _layer(watch: Stopwatch) -> Call:
  width, rows = (2048, 16) if watch.machine.platform == 'cpu' else (2048, 2048)
  return layers.mlp_layer(watch, DTYPE, width)(rows)


def _lost(watch: Stopwatch, call, start: Start) -> float:
  moving = watch.wall(lambda _: start(), lambda wait: wait())
  calls = max(1, min(_MOST_CALLS, round(moving / watch.on_device(call))))

  def compute() -> None:
    for n in range(calls):
      last = call(n)
      if watch.machine.platform == 'cpu':  # else they run beside each other
        jax.block_until_ready(last)
    jax.block_until_ready(last)

  def both() -> None:
    wait = start()
    compute()
    wait()

  computing = _median(compute)
  moving = _median(lambda: start()())
  together = _median(both)
  longer, shorter = max(computing, moving), min(computing, moving)
  return max(0.0, min(1.0, (together - longer) / shorter))


def _median(run: Callable[[], object]) -> float:
  seconds = []
  for _ in range(_TURNS):
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)
