"""Times reads and writes of a disk tier, below a directory that is left as it
was."""

import itertools
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flexjax.hardware import Curve, rising
from flexjax.runtime import devices
from flexjax.runtime.compute import CACHE_AXIS
from flexjax.runtime.formats import Format
from flexjax.runtime.timing import layers
from flexjax.runtime.timing.links import (
  AT_ONCE,
  DTYPE,
  ROW,
  Start,
  arrive,
  fill,
  spec_of,
)
from flexjax.runtime.timing.points import Points
from flexjax.runtime.timing.stopwatch import Stopwatch
from flexjax.tiers.base import At, spec_bytes
from flexjax.tiers.disk import DiskTier
from flexjax.typing import Key

_READ_PATIENCE = 5  # times as long as others: reads of files vary most
_MOST_KEYS = 64  # each takes files of its own


def curves(
  watch: Stopwatch, points: Points, disk_dir: Path
) -> dict[str, dict[str, Curve]]:
  """Seconds of reads and writes below `disk_dir`, which is left as it was: the
  tables `links`, `alone` and `fresh` of a record.

  A read ends where a run computes with it. Weights are in the page cache, as in
  a run whose disk tier fits in it, and got there by being read: the pages that
  they lie in are of another size than those of what was written. What is fresh
  is a cache, in files of some of its rows.

  Raises:
    InputError: `disk_dir` cannot be written.
  """
  reads, alone, fresh, writes = [], [], [], []
  free = devices.free_disk(disk_dir)
  room, cold = free // (2 * AT_ONCE), min(points.cold_bytes, free // 2)
  with tier_below(watch, disk_dir) as tier:
    for n, width in enumerate(points.disk_widths):
      if not n or 12 * width * width * 4 <= room:
        size, several, one = _weights_read(watch, tier, width, cold)
        reads.append((size, several))
        alone.append((size, one))
    for n, nbytes in enumerate(points.disk_writes):
      if not n or nbytes <= room:
        writes.append((nbytes, _disk_write(watch, tier, nbytes)))
        fresh.append((nbytes, _cache_read(watch, tier, nbytes, cold)))
  return {
    'links': {'disk_to_host': rising(reads), 'host_to_disk': rising(writes)},
    'alone': {'disk_to_host': rising(alone)},
    'fresh': {'disk_to_host': rising(fresh)},
  }


def _weights_read(
  watch: Stopwatch, tier: DiskTier, width: int, cold: int
) -> tuple[int, float, float]:
  """Bytes of a layer's weights of width D, and the seconds of one of many that
  are read one after another: with as many under way as a run has, and alone."""
  specs = Format('float32').specs(layers.config(width))[2:4]
  size = sum(map(spec_bytes, specs)) // 2
  keys: list[Key] = [('weights', n) for n in range(_count(size, cold))]
  for n, key in enumerate(keys):
    spec = specs[n % 2]
    tier.allocate(key, spec)
    tier.write(
      key, {x: watch.numbers(s.shape, s.dtype) for x, s in spec.items()}
    )
    tier.wait()
  _forget(tier.root)
  _read_all(tier, keys, AT_ONCE)  # from the disk; the next one is slow, too
  several = _one_of(watch, tier, keys, AT_ONCE)
  alone = _one_of(watch, tier, keys, 1)
  _delete(tier, keys)
  return size, several, alone


def _cache_read(
  watch: Stopwatch, tier: DiskTier, nbytes: int, cold: int
) -> float:
  """Seconds of one of many caches of `nbytes` each that have just been written
  and are read one after another, with as many under way as a run has."""
  shape = _cache_shape(nbytes)
  keys: list[Key] = [('cache', 0, n) for n in range(_count(nbytes, cold))]
  for key in keys:
    tier.allocate(key, spec_of(shape))
    tier.write(key, {'k': watch.numbers(shape, DTYPE)})
    tier.wait()
  seconds = _one_of(watch, tier, keys, AT_ONCE)
  for key in keys:
    tier.free(key)
  return seconds


def _count(nbytes: int, cold: int) -> int:
  """Keys that are read in turn, so that they come from memory and not from a
  cache."""
  return min(max(2 * AT_ONCE, cold // nbytes), _MOST_KEYS)


def _read_all(tier: DiskTier, keys: Sequence[Key], at_once: int) -> None:
  under_way: deque = deque()
  for key in keys:
    under_way.append(tier.read(key))
    if len(under_way) == at_once:
      arrive(under_way.popleft())
  for read in under_way:
    arrive(read)


def _one_of(
  watch: Stopwatch, tier: DiskTier, keys: Sequence[Key], at_once: int
) -> float:
  seconds = watch.wall(
    lambda _: _read_all(tier, keys, at_once),
    lambda done: None,
    patience=_READ_PATIENCE,
  )
  return seconds / len(keys)


def _forget(root: Path) -> None:
  """Takes files out of the page cache, where the system can be asked to."""
  if not hasattr(os, 'posix_fadvise'):
    return
  for path in filter(Path.is_file, root.rglob('*')):
    with path.open('rb') as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def tier_below(watch: Stopwatch, disk_dir: Path) -> Iterator[DiskTier]:
  """Yields a tier in a folder of its own, and deletes that afterwards."""
  # Named like a run's scratch: should this process be killed, the next disk
  # tier there deletes it.
  name = f'run-{os.getpid()}-{uuid.uuid4().hex[:8]}'
  root, machine = disk_dir / name, watch.machine
  made = not disk_dir.exists()
  try:
    tier = DiskTier(root, machine.pinned, machine.device)
    try:
      yield tier
    finally:
      tier.close()
  finally:
    shutil.rmtree(root, ignore_errors=True)
    if made:
      with suppress(OSError):  # it may have become someone else's, too
        disk_dir.rmdir()


@contextmanager
def weights(
  watch: Stopwatch, tier: DiskTier, nbytes: int, cold: int
) -> Iterator[Start]:
  """Weights of `nbytes` each, and what starts to read several at once: in turn
  from `cold` bytes, so that they come from memory and not from a cache."""
  count = min(max(AT_ONCE, -(-cold // nbytes)), _MOST_KEYS)
  keys: list[Key] = [('weights', n) for n in range(count)]
  for key in keys:
    fill(watch, tier, key, (nbytes // ROW, ROW // 4), 'kv')
  turns = itertools.cycle(keys)

  def start():
    pending = [tier.read(next(turns)) for _ in range(AT_ONCE)]

    def wait():
      for read in pending:
        arrive(read)

    return wait

  yield start
  _delete(tier, keys)


def _delete(tier: DiskTier, keys: Sequence[Key]) -> None:
  """Frees weights, which outlive their tier: other sizes would find no room."""
  for key in keys:
    tier.free(key)
    shutil.rmtree(tier.root / '.'.join(map(str, key)))


def _disk_write(watch: Stopwatch, tier: DiskTier, nbytes: int) -> float:
  key: Key = ('cache', 0, 0)
  shape = _cache_shape(nbytes)
  value = {'k': watch.numbers(shape, DTYPE)}
  tier.allocate(key, spec_of(shape))

  def call(_):
    tier.write(key, value, At(CACHE_AXIS, 0))

  seconds = watch.wall(call, lambda _: tier.wait())
  tier.free(key)
  return seconds


def _cache_shape(nbytes: int) -> tuple[int, ...]:
  return (8, 8, nbytes // 2**13, 64)  # keys; rows of 64 numbers in 16 bits


def row_write(watch: Stopwatch, points: Points, disk_dir: Path) -> Curve:
  """Bytes that are read and written to change a row -> seconds, of each of
  several such writes under way."""
  found = []
  with tier_below(watch, disk_dir) as tier:
    for half in points.rewritten:
      with rows(watch, tier, half) as start:
        seconds = watch.wall(lambda _: start(), lambda wait: wait())
      found.append((4 * half, seconds / AT_ONCE))
  return rising(found)


@contextmanager
def rows(watch: Stopwatch, tier: DiskTier, half: int) -> Iterator[Start]:
  """Caches with keys, and values, of `half` bytes; what starts to write a row
  into several of them."""
  dtype = 'float32'
  shape = (8, 8, half // 2**14, 64)
  keys: list[Key] = [('cache', 0, n) for n in range(AT_ONCE)]
  rows = {x: watch.numbers((8, 8, 1, 64), dtype) for x in 'kv'}
  for key in keys:
    fill(watch, tier, key, shape, 'kv', dtype)

  def start():
    for key in keys:
      tier.write(key, rows, At(CACHE_AXIS, 1))
    return tier.wait

  yield start
  for key in keys:
    tier.free(key)
