"""Times what moves bytes between memories, by the tiers that a run keeps them
in."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flexjax.hardware import Curve, rising
from flexjax.runtime import devices
from flexjax.runtime.compute import CACHE_AXIS
from flexjax.runtime.timing.points import Points
from flexjax.runtime.timing.stopwatch import Stopwatch
from flexjax.tiers.base import At, Pending, Spec, Tier
from flexjax.tiers.device import DeviceTier
from flexjax.tiers.host import HostTier
from flexjax.typing import Key

DTYPE = 'bfloat16'
ROW = 4096  # bytes of a row of what is moved
AT_ONCE = 3  # reads under way, as with a prefetch depth of two
_LARGER = 30  # times that a cache is as large as the rows written to it
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
    if n and 2 * AT_ONCE * nbytes > watch.room:
      continue
    key: Key = ('weights', n)
    fill(watch, tier, key, (nbytes // ROW, ROW // 4), 'kv')
    there = {
      name: watch.numbers((nbytes // ROW, ROW // 4), DTYPE) for name in 'kv'
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
  few = watch.wall(lambda _: [transfer() for _ in range(AT_ONCE)])
  many = watch.wall(lambda _: [transfer() for _ in range(2 * AT_ONCE)])
  return max(many - few, few / AT_ONCE / 10) / AT_ONCE


def row_write(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """Tier -> bytes that new rows take in a cache -> seconds of writing them.

  'cpu' is a cache that the CPU attends to beside an accelerator.
  """
  machine, attended = watch.machine, devices.ATTENDED[-1]
  on_device = watch.on_device
  if machine.unified:  # the same memory, written by the same function
    tier = DeviceTier(machine.device)
    curve = _write_curve(watch, points, tier, attended, on_device)
    return {'device': curve, 'host': curve}
  there = DeviceTier(machine.device)
  host = HostTier(machine.pinned, machine.device)
  near = HostTier(machine.cpu, machine.cpu)
  return {
    'device': _write_curve(watch, points, there, DTYPE, on_device),
    'host': _write_curve(watch, points, host, DTYPE, on_device),
    # The device's head start would hide what the CPU does.
    'cpu': _write_curve(watch, points, near, attended, watch.wall),
  }


def _write_curve(
  watch: Stopwatch,
  points: Points,
  tier: DeviceTier,
  dtype: str,
  clock: Callable[..., float],
) -> Curve:
  key: Key = ('cache', 0, 0)
  found = []
  for first, (b, n, t, h) in enumerate(points.written):
    nbytes = 2 * b * n * t * h * jnp.dtype(dtype).itemsize  # keys and values
    if first and _LARGER * nbytes > watch.room:
      continue
    fill(watch, tier, key, (b, n, _LARGER * t, h), 'kv', dtype)
    # At home already: how they got there is the link's time.
    rows = {x: watch.numbers((b, n, t, h), dtype, tier.home) for x in 'kv'}

    def call(turn, rows=rows, t=t):
      # Not the first rows, which a host tier takes in another way.
      tier.write(key, rows, At(CACHE_AXIS, (1 + turn % 4) * t))

    found.append((nbytes, clock(call, lambda _: tier.wait())))
    tier.free(key)
  tier.close()
  return rising(found)


def fill(
  watch: Stopwatch,
  tier: Tier,
  key: Key,
  shape,
  names: str = 'x',
  dtype: str = DTYPE,
) -> None:
  home = tier.home if isinstance(tier, DeviceTier) else watch.machine.pinned
  tier.allocate(key, spec_of(shape, names, dtype))
  tier.write(key, {x: watch.numbers(shape, dtype, home) for x in names})
  tier.wait()


def spec_of(shape, names: str = 'k', dtype: str = DTYPE) -> Spec:
  one = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
  return dict.fromkeys(names, one)


def arrive(read: Pending) -> None:
  jax.block_until_ready(read.result())
  read.release()
