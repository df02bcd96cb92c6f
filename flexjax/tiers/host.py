"""Pinned host memory: asynchronous copies at the link's full rate.

On a CPU backend host and device are the same memory, so a read is the array
itself; everywhere else it is a `device_put`, queued and not waited for.
"""

import jax
from jax.sharding import Sharding

from flexjax.tiers.base import At, Pending, Ready, Value
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
    if self.via is not None:
      # A device array straight to the CPU's own memory: 1.3 GB/s, not 50.
      value = jax.device_put(dict(value), self.via)
    super().write(key, value, at)
