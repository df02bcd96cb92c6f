"""The accelerator's own memory: reads cost nothing, writes stay in place."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from flexjax.tiers.base import (
  At,
  Pending,
  Ready,
  Spec,
  Tier,
  Updater,
  Value,
  make_updater,
)
from flexjax.typing import Key


class DeviceTier(Tier):
  """Values as committed arrays in the memory that `home` names."""

  def __init__(self, home: Sharding):
    super().__init__()
    self.home = home
    self._values: dict[Key, dict[str, jax.Array]] = {}
    self._updaters: dict[int, Updater] = {}
    self._indices: dict[int, jax.Array] = {}

  def allocate(self, key: Key, spec: Spec) -> None:
    super().allocate(key, spec)
    self._values[key] = {}

  def free(self, key: Key) -> None:
    super().free(key)
    del self._values[key]

  def read(self, key: Key, rows: int | None = None) -> Pending:
    del rows
    return Ready(dict(self._values[key]))

  def write(self, key: Key, value: Value, at: At | None = None) -> None:
    values = self._values[key]
    if at is None:
      values.update(self._moved(value))
      return
    update = self._updaters.get(at.axis)
    if update is None:
      update = self._updaters[at.axis] = make_updater(at.axis)
    if not values:
      # Zeros, because what is masked must still be finite.
      values.update(
        jax.device_put(
          {n: np.zeros(s.shape, s.dtype) for n, s in self.specs[key].items()},
          self.home,
        )
      )
    self._values[key] = update(values, self._near(value), self._index(at.begin))

  def written(self, key: Key) -> Any:
    return list(self._values[key].values())

  def _moved(self, value: Value) -> dict[str, jax.Array]:
    """Brings a value home; one that is there already costs no call."""
    if all(getattr(v, 'sharding', None) == self.home for v in value.values()):
      return dict(value)
    return jax.device_put(dict(value), self.home)

  def _near(self, value: Value) -> Value:
    """Brings rows to home's device, whose updater moves them on between its
    memories: a call less, and the largest part of what a write costs."""
    devices = self.home.device_set
    if all(
      isinstance(v, jax.Array) and v.sharding.device_set == devices
      for v in value.values()
    ):
      return value
    return self._moved(value)

  def borrow(self, nbytes: int) -> None:
    """Counts bytes that are here for a while: what streams through."""
    self._count(nbytes)

  def stored_nbytes(self, key: Key, rows: int | None = None) -> int:
    del rows
    return sum(array.nbytes for array in self._values[key].values())

  def close(self) -> None:
    self._values.clear()

  def wait(self) -> None:
    jax.block_until_ready(self._values)

  def _index(self, index: int) -> jax.Array:
    if index not in self._indices:
      device = next(iter(self.home.device_set))
      self._indices[index] = jax.device_put(np.int32(index), device)
    return self._indices[index]
