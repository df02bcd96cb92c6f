"""Placement + tiers: finds the tier of a key, and keeps the accounts.

The engine asks for keys and never learns where they live; the tiers move
bytes and never learn why. Every byte that crosses a link is counted here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flexjax.runtime.meter import Meter
from flexjax.runtime.recorder import Recorder
from flexjax.tiers.base import At, Pending, Spec, Tier, Value
from flexjax.tiers.device import DeviceTier
from flexjax.tiers.disk import DiskTier
from flexjax.typing import Key

_DOWN = {
  'device': (),
  'host': ('device_to_host',),
  'disk': ('device_to_host', 'host_to_disk'),
}
_UP = {
  'device': (),
  'host': ('host_to_device',),
  'disk': ('disk_to_host', 'host_to_device'),
}


class Store:
  """Keys, wherever they live.

  Args:
    tiers: by name: 'device', 'host', and 'disk' where there is one.
    attended: the tier of a cache that the CPU attends to in place; its bytes
      are host bytes, and reading it crosses nothing.

  Attributes:
    recorder: told of everything that crosses a link, where there is one.
  """

  def __init__(
    self, tiers: Mapping[str, Tier], attended: Tier | None, meter: Meter
  ):
    self.tiers = dict(tiers)
    self.attended = attended
    self.meter = meter
    self.recorder: Recorder | None = None
    self.places: dict[Key, str] = {}
    self._returned = 0

  def allocate(self, key: Key, spec: Spec, place: str) -> None:
    self.places[key] = place
    self._tier(key).allocate(key, spec)

  def free(self, key: Key) -> None:
    self._tier(key).free(key)
    del self.places[key]

  def spec(self, key: Key) -> Spec:
    return self._tier(key).specs[key]

  def fetch(self, key: Key, rows: int | None = None) -> Pending:
    """Starts bringing a key to where it is computed with."""
    tier = self._tier(key)
    pending = tier.read(key, rows)
    if tier is self.attended:
      return pending
    place = self.places[key]
    if place == 'device':
      return pending
    nbytes = tier.stored_nbytes(key, rows)
    self.meter.crossed(*_UP[place], nbytes=nbytes)
    if self.recorder is not None:
      self.recorder.load(key, nbytes, _UP[place], pending, tier.moves)
    if not tier.moves:
      return pending
    # A host read is queued already; a disk read is waited for by the watcher.
    queued = place == 'host'
    self.meter.watch(pending.result() if queued else pending.result)
    self.device.borrow(nbytes)
    return _Borrowed(pending, self, nbytes)

  def put(self, key: Key, value: Value, at: At | None = None) -> None:
    """Stores a value, or rows of it, where the key lives."""
    tier, links = self._tier(key), _DOWN[self.places[key]]
    ends = []
    if self.recorder is not None and isinstance(tier, DiskTier):
      # The tier's own first step: done here, its end can be watched.
      value = jax.device_put(dict(value), tier.host)
      ends.append(value)
    tier.write(key, value, at)
    if links:
      nbytes = tier.sent_nbytes(key, value, at)
      self.meter.crossed(*links, nbytes=nbytes)
      if self.recorder is not None:
        ends.append(tier.written(key))
        self.recorder.store(key, nbytes, links, ends)

  def replaceable(self, key: Key) -> bool:
    """Whether a compute may take a key's value and hand back a new one: it is
    in an accelerator's own memory."""
    return self.places[key] == 'device' and self.tiers['host'].moves

  def sending(self, key: Key) -> Any:
    """Returns what has yet to arrive in host memory; it holds memory on the
    device until then."""
    tier = self._tier(key)
    sends = self.places[key] == 'host' and tier.moves
    return tier.written(key) if sends else ()

  def given_back(self, nbytes: int) -> None:
    """Takes note that a read's bytes will be free when its reader is done."""
    self._returned += nbytes

  def take_returned(self) -> int:
    """Returns the bytes given back since it was last asked: they count until
    whoever asks says otherwise, to `device.borrow`."""
    returned, self._returned = self._returned, 0
    return returned

  @property
  def device(self) -> DeviceTier:
    tier = self.tiers['device']
    assert isinstance(tier, DeviceTier)
    return tier

  def reset_peaks(self) -> None:
    """Starts the peaks anew, from what is held now."""
    for tier in (*self.tiers.values(), self.attended):
      if tier is not None:
        tier.peak_nbytes = tier.nbytes
    disk = self.tiers.get('disk')
    if isinstance(disk, DiskTier):
      disk.peak_host_nbytes = disk.host_nbytes

  def peak_bytes(self) -> dict[str, int]:
    """Returns the most bytes that every tier has held."""
    peak = {name: tier.peak_nbytes for name, tier in self.tiers.items()}
    if self.attended is not None:
      peak['host'] += self.attended.peak_nbytes
    disk = self.tiers.get('disk')
    if isinstance(disk, DiskTier) and not disk.unified:
      peak['host'] += disk.peak_host_nbytes
    return {'device': 0, 'host': 0, 'disk': 0} | peak

  def _tier(self, key: Key) -> Tier:
    if self.attended is not None and key[0] == 'cache':
      return self.attended
    return self.tiers[self.places[key]]


class _Borrowed:
  """A read that takes device memory until its reader is done."""

  def __init__(self, pending: Pending, store: Store, nbytes: int):
    self._pending, self._store, self._nbytes = pending, store, nbytes

  def result(self) -> dict[str, jax.Array]:
    return self._pending.result()

  def release(self, after: Sequence[jax.Array] = ()) -> None:
    self._store.given_back(self._nbytes)
    self._pending.release(after)
