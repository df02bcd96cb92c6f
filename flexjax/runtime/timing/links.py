"""Times what moves bytes, by the tiers that a run keeps them in."""

import functools
import itertools
import os
import shutil
import statistics
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import jax.numpy as jnp

from flexjax.hardware import Curve, rising
from flexjax.runtime import devices
from flexjax.runtime.compute import CACHE_AXIS
from flexjax.runtime.formats import Format
from flexjax.runtime.timing import layers
from flexjax.runtime.timing.points import Points
from flexjax.runtime.timing.stopwatch import Stopwatch
from flexjax.tiers.base import At, Pending, Spec, Tier, spec_bytes
from flexjax.tiers.device import DeviceTier
from flexjax.tiers.disk import DiskTier
from flexjax.tiers.host import HostTier
from flexjax.typing import Key

_DTYPE = 'bfloat16'
_ATTENDED = 'float32'  # of a cache that the CPU attends to
_ROW = 4096  # bytes of a row of what is moved
_AT_ONCE = 3  # reads under way, as with a prefetch depth of two
_LARGER = 30  # times that a cache is as large as the rows written to it
_TURNS = 7  # runs of which the median counts
_READ_PATIENCE = 5  # times as long as others: reads of files vary most
_MOST_KEYS = 64  # each takes files of its own
Start = Callable[[], Callable[[], None]]
"""Starts transfers; returns what waits for them."""


def host_links(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """Seconds of a transfer that others come before and after, as in a run that
  loads ahead; none if host and device are one."""
  machine = watch.machine
  if machine.unified:
    return {}
  tier = HostTier(machine.pinned, machine.device)
  up, down = [], []
  for n, nbytes in enumerate(points.link_bytes):
    if n and 2 * _AT_ONCE * nbytes > watch.room:
      continue
    key: Key = ('weights', n)
    _fill(watch, tier, key, (nbytes // _ROW, _ROW // 4), 'kv')
    there = {
      name: watch.numbers((nbytes // _ROW, _ROW // 4), _DTYPE) for name in 'kv'
    }

    def read(key=key):
      return tier.read(key).result()

    def write(there=there):
      return jax.device_put(there, machine.pinned)

    up.append((nbytes, _one_more(watch, read)))
    down.append((nbytes, _one_more(watch, write)))
    tier.free(key)
  tier.close()
  return {
    'host_to_device': rising(up),
    'device_to_host': rising(down),
  }


def _one_more(watch: Stopwatch, transfer: Callable[[], object]) -> float:
  """Seconds that each transfer adds to some that are under way."""
  few = watch.wall(lambda _: [transfer() for _ in range(_AT_ONCE)])
  many = watch.wall(lambda _: [transfer() for _ in range(2 * _AT_ONCE)])
  return max(many - few, few / _AT_ONCE / 10) / _AT_ONCE


def disk_links(
  watch: Stopwatch, points: Points, disk_dir: Path
) -> dict[str, dict[str, Curve]]:
  """Seconds of reads and writes below `disk_dir`, which is left as it was: the
  tables `links`, `alone` and `fresh` of a record.

  A read ends where a run computes with it. Files are in the page cache, as in
  a run whose disk tier fits in it, and got there by being read; what has just
  been written lies in larger pages, and is read up to twice as fast.

  Raises:
    InputError: `disk_dir` cannot be written.
  """
  reads, alone, fresh, writes = [], [], [], []
  room = devices.free_disk(disk_dir) // (2 * _AT_ONCE)
  with _disk_tier(watch, disk_dir) as tier:
    for n, width in enumerate(points.disk_widths):
      if not n or 12 * width * width * 4 <= room:
        size, new, several, one = _disk_read(
          watch, tier, width, points.cold_bytes
        )
        reads.append((size, several))
        alone.append((size, one))
        fresh.append((size, new))
    for n, nbytes in enumerate(points.disk_writes):
      if not n or nbytes <= room:
        writes.append((nbytes, _disk_write(watch, tier, nbytes)))
  return {
    'links': {'disk_to_host': rising(reads), 'host_to_disk': rising(writes)},
    'alone': {'disk_to_host': rising(alone)},
    'fresh': {'disk_to_host': rising(fresh)},
  }


def _disk_read(
  watch: Stopwatch, tier: DiskTier, width: int, cold: int
) -> tuple[int, float, float, float]:
  """Bytes of a layer's weights of width D, and the seconds of one of many that
  are read one after another: with as many under way as a run has, when they
  have just been written and when they have been read in, and alone."""
  specs = Format('float32').specs(layers.config(width))[2:4]
  size = sum(map(spec_bytes, specs)) // 2
  count = min(max(2 * _AT_ONCE, cold // size), _MOST_KEYS)
  keys: list[Key] = [('weights', n) for n in range(count)]
  for n, key in enumerate(keys):
    spec = specs[n % 2]
    tier.allocate(key, spec)
    tier.write(
      key, {x: watch.numbers(s.shape, s.dtype) for x, s in spec.items()}
    )
    tier.wait()

  def read_all(at_once: int, _=None) -> None:
    under_way: deque = deque()
    for key in keys:
      under_way.append(tier.read(key))
      if len(under_way) == at_once:
        _arrive(under_way.popleft())
    for read in under_way:
      _arrive(read)

  def timed(at_once: int) -> float:
    return watch.wall(
      functools.partial(read_all, at_once),
      lambda done: None,
      patience=_READ_PATIENCE,
    )

  fresh = timed(_AT_ONCE)
  _forget(tier.root)
  read_all(_AT_ONCE)  # from the disk; the next one is slow, too
  several, alone = timed(_AT_ONCE), timed(1)
  for key in keys:
    tier.free(key)
    shutil.rmtree(tier.root / '.'.join(map(str, key)))
  return size, fresh / count, several / count, alone / count


def _forget(root: Path) -> None:
  """Takes files out of the page cache, where the system can be asked to."""
  if not hasattr(os, 'posix_fadvise'):
    return
  for path in filter(Path.is_file, root.rglob('*')):
    with path.open('rb') as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _arrive(read: Pending) -> None:
  jax.block_until_ready(read.result())
  read.release()


@contextmanager
def _disk_tier(watch: Stopwatch, disk_dir: Path) -> Iterator[DiskTier]:
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
def _on_disk(
  watch: Stopwatch, tier: DiskTier, nbytes: int, cold: int
) -> Iterator[Start]:
  """Weights of `nbytes` each, and what starts to read several at once: in turn
  from `cold` bytes, so that they come from memory and not from a cache."""
  count = min(max(_AT_ONCE, -(-cold // nbytes)), _MOST_KEYS)
  keys: list[Key] = [('weights', n) for n in range(count)]
  for key in keys:
    _fill(watch, tier, key, (nbytes // _ROW, _ROW // 4), 'kv')
  turns = itertools.cycle(keys)

  def start():
    pending = [tier.read(next(turns)) for _ in range(_AT_ONCE)]

    def wait():
      for read in pending:
        _arrive(read)

    return wait

  yield start
  for key in keys:
    tier.free(key)
    # Weights outlive their tier: other sizes would not find room.
    shutil.rmtree(tier.root / '.'.join(map(str, key)))


def _disk_write(watch: Stopwatch, tier: DiskTier, nbytes: int) -> float:
  key: Key = ('cache', 0, 0)
  shape = (8, 8, nbytes // 2**13, 64)  # keys; rows of 64 numbers in 16 bits
  value = {'k': watch.numbers(shape, _DTYPE)}
  tier.allocate(key, _spec(shape))

  def call(_):
    tier.write(key, value, At(CACHE_AXIS, 0))

  seconds = watch.wall(call, lambda _: tier.wait())
  tier.free(key)
  return seconds


def disk_row_write(watch: Stopwatch, points: Points, disk_dir: Path) -> Curve:
  """Bytes that are read and written to change a row -> seconds, of each of
  several such writes under way."""
  found = []
  with _disk_tier(watch, disk_dir) as tier:
    for half in points.rewritten:
      with _rows_on_disk(watch, tier, half) as start:
        seconds = watch.wall(lambda _: start(), lambda wait: wait())
      found.append((4 * half, seconds / _AT_ONCE))
  return rising(found)


@contextmanager
def _rows_on_disk(
  watch: Stopwatch, tier: DiskTier, half: int
) -> Iterator[Start]:
  """Caches with keys, and values, of `half` bytes; what starts to write a row
  into several of them."""
  shape = (8, 8, half // 2**14, 64)  # float32
  keys: list[Key] = [('cache', 0, n) for n in range(_AT_ONCE)]
  rows = {x: watch.numbers((8, 8, 1, 64), _ATTENDED) for x in 'kv'}
  for key in keys:
    _fill(watch, tier, key, shape, 'kv', _ATTENDED)

  def start():
    for key in keys:
      tier.write(key, rows, At(CACHE_AXIS, 1))
    return tier.wait

  yield start
  for key in keys:
    tier.free(key)


def row_write(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """Tier -> bytes of new rows -> seconds of writing them into a cache.

  'cpu' is a cache that the CPU attends to beside an accelerator.
  """
  machine = watch.machine
  if machine.unified:  # the same memory, written by the same function
    tier = DeviceTier(machine.device)
    curve = _write_curve(watch, points, tier, _ATTENDED)
    return {'device': curve, 'host': curve}
  host = HostTier(machine.pinned, machine.device)
  attended = HostTier(machine.cpu, machine.cpu)
  return {
    'device': _write_curve(watch, points, DeviceTier(machine.device), _DTYPE),
    'host': _write_curve(watch, points, host, _DTYPE),
    'cpu': _write_curve(watch, points, attended, _ATTENDED),
  }


def _write_curve(
  watch: Stopwatch, points: Points, tier: DeviceTier, dtype: str
) -> Curve:
  key: Key = ('cache', 0, 0)
  found = []
  for first, (b, n, t, h) in enumerate(points.written):
    nbytes = 2 * b * n * t * h * jnp.dtype(_DTYPE).itemsize  # keys and values
    if first and _LARGER * nbytes > watch.room:
      continue
    _fill(watch, tier, key, (b, n, _LARGER * t, h), 'kv', dtype)
    # At home already: how they got there is the link's time.
    rows = {x: watch.numbers((b, n, t, h), _DTYPE, tier.home) for x in 'kv'}

    def call(turn, rows=rows, t=t):
      # Not the first rows, which a host tier takes in another way.
      tier.write(key, rows, At(CACHE_AXIS, (1 + turn % 4) * t))

    found.append((nbytes, watch.on_device(call, lambda _: tier.wait())))
    tier.free(key)
  tier.close()
  return rising(found)


def contention(
  watch: Stopwatch, points: Points, disk_dir: Path | None
) -> dict[str, float]:
  """Link -> part of its busy time that computing loses.

  0 where both at once take as long as the longer of them, 1 where they take
  as long as one after the other.
  """
  if watch.machine.unified and disk_dir is None:
    return {}
  width, rows = (2048, 16) if watch.machine.platform == 'cpu' else (2048, 2048)
  call = layers.mlp_layer(watch, _DTYPE, width)(rows)
  found = {}
  if disk_dir is not None:
    with (
      _disk_tier(watch, disk_dir) as disk,
      _rows_on_disk(watch, disk, points.rewritten[-1]) as start,
    ):
      found['host_to_disk'] = _lost(watch, call, start)
    # A CPU reads files with the cores that it computes with: measured, it was
    # 0.4 to 1 from one minute to the next.
    found['disk_to_host'] = 1.0
  if disk_dir is not None and not watch.machine.unified:
    with (
      _disk_tier(watch, disk_dir) as disk,
      _on_disk(
        watch, disk, points.contending_bytes, points.cold_bytes
      ) as start,
    ):
      found['disk_to_host'] = _lost(watch, call, start)
  if not watch.machine.unified:
    found |= _host_contention(watch, points, call)
  return found


def _host_contention(watch: Stopwatch, points: Points, call):
  machine, key = watch.machine, ('weights', 0)
  shape = (points.contending_bytes // _ROW, _ROW // 2)
  tier = HostTier(machine.pinned, machine.device)
  _fill(watch, tier, key, shape)
  there = watch.numbers(shape, _DTYPE)

  def up():
    moved = [tier.read(key).result() for _ in range(_AT_ONCE)]
    return lambda: jax.block_until_ready(moved)

  def down():
    moved = [jax.device_put(there, machine.pinned) for _ in range(_AT_ONCE)]
    return lambda: jax.block_until_ready(moved)

  found = {
    'host_to_device': _lost(watch, call, up),
    'device_to_host': _lost(watch, call, down),
  }
  tier.close()
  return found


def _lost(watch: Stopwatch, call, start: Start) -> float:
  moving = watch.wall(lambda _: start(), lambda wait: wait())
  calls = max(1, round(moving / watch.on_device(call)))

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


def _fill(
  watch: Stopwatch,
  tier: Tier,
  key: Key,
  shape,
  names: str = 'x',
  dtype: str = _DTYPE,
) -> None:
  home = tier.home if isinstance(tier, DeviceTier) else watch.machine.pinned
  tier.allocate(key, _spec(shape, names, dtype))
  tier.write(key, {x: watch.numbers(shape, dtype, home) for x in names})
  tier.wait()


def _spec(shape, names: str = 'k', dtype: str = _DTYPE) -> Spec:
  one = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
  return dict.fromkeys(names, one)
