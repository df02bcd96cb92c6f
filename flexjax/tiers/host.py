"""Pinned host memory: asynchronous copies at the link's full rate.

On a CPU backend host and device are the same memory, so a read is the array
itself; everywhere else it is a `device_put`, queued and not waited for. Rows
that a value begins with are padded on the device and sent as the whole value:
one copy, beside which computing goes on. Writing into pinned memory would be a
kernel, which the device waits for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from flexjax.tiers.base import At, Pending, Ready, Spec, Value
from flexjax.tiers.device import DeviceTier
from flexjax.typing import Key


class HostTier(DeviceTier):
  """Values in host memory `home`, handed out in the memory `device`.

  Where the two are one memory, nothing is copied (`moves` is False).

  Args:
    via: memory that what is written passes through on its way home.
  """

  def __init__(
    self, home: Sharding, device: Sharding, via: Sharding | None = None
  ):
    super().__init__(home)
    self.via = via
    self.device = device
    self.moves = home != device

  def read(self, key: Key, rows: int | None = None) -> Pending:
    del rows
    values = dict(self._values[key])
    if self.moves:
      values = jax.device_put(values, self.device)
    return Ready(values)

  def write(self, key: Key, value: Value, at: At | None = None) -> None:
    if self._pads(at):
      assert at is not None
      value = _padded(value, at.axis, _lengths(self.specs[key], at.axis))
      self._values[key].clear()  # what was there makes room
      at = None
    if self.via is not None:
      # A device array straight to the CPU's own memory: 1.3 GB/s, not 50.
      value = jax.device_put(dict(value), self.via)
    super().write(key, value, at)

  def sent_nbytes(self, key: Key, value: Value, at: At | None) -> int:
    if self._pads(at):
      return self.sizes[key]
    return super().sent_nbytes(key, value, at)

  def _pads(self, at: At | None) -> bool:
    return self.moves and at is not None and at.begin == 0


def _lengths(spec: Spec, axis: int) -> tuple[tuple[str, int], ...]:
  return tuple((name, s.shape[axis]) for name, s in spec.items())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _padded(value: Value, axis: int, lengths) -> dict[str, jax.Array]:
  """Values with zeros behind them, because what is masked must be finite."""

  def pad(x: jax.Array, length: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)

  return {name: pad(value[name], length) for name, length in lengths}
