"""What the engine may ask of a memory tier; hides where bytes lie and how
they travel. Tiers never compute, layers never move data.

A value is a dict of named arrays under one key. Reading hands out arrays on
the accelerator; writing takes arrays from it (or from NumPy, while loading).
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from flexjax.typing import Key

Value = Mapping[str, Any]
Spec = Mapping[str, jax.ShapeDtypeStruct]


class At(NamedTuple):
  """Where a partial write goes: from `begin` on along `axis`."""

  axis: int
  begin: int


class Pending(Protocol):
  """A read on its way."""

  def result(self) -> dict[str, jax.Array]:
    """Returns arrays on the device; waits only for what cannot be queued.

    Raises:
      OSError: the read failed.
    """
    ...

  def release(self, after: Sequence[jax.Array] = ()) -> None:
    """Gives the memory back, for use once all of `after` are computed."""
    ...


class Ready:
  """A read that needs no move, or whose move has been queued."""

  def __init__(self, value: dict[str, jax.Array]):
    self._value: dict[str, jax.Array] | None = value

  def result(self) -> dict[str, jax.Array]:
    assert self._value is not None, 'read after release'
    return self._value

  def release(self, after: Sequence[jax.Array] = ()) -> None:
    del after
    self._value = None


def spec_bytes(spec: Spec) -> int:
  return sum(
    int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in spec.values()
  )


class Tier(abc.ABC):
  """One memory: keyed values, and an exact count of their bytes.

  Attributes:
    moves: whether a read takes memory of its own on the device.
    specs, sizes: shapes and dtypes, and bytes, of every key.
    nbytes: bytes allocated now.
    peak_nbytes: the most there have ever been.
  """

  moves = False

  def __init__(self) -> None:
    self.specs: dict[Key, Spec] = {}
    self.sizes: dict[Key, int] = {}
    self.nbytes = 0
    self.peak_nbytes = 0

  def allocate(self, key: Key, spec: Spec) -> None:
    """Reserves room for `key`; a partial write may follow at once."""
    assert key not in self.specs, f'{key} is already allocated'
    self.specs[key] = dict(spec)
    self.sizes[key] = spec_bytes(spec)
    self._count(self.sizes[key])

  def free(self, key: Key) -> None:
    """Forgets `key` and gives its room back."""
    del self.specs[key]
    self._count(-self.sizes.pop(key))

  @abc.abstractmethod
  def read(self, key: Key, rows: int | None = None) -> Pending:
    """Starts bringing `key` to the device; does not block.

    `rows` bounds how many rows of the second last axis are of interest: a
    tier may leave the rest undefined.
    """

  @abc.abstractmethod
  def write(self, key: Key, value: Value, at: At | None = None) -> None:
    """Stores a whole value, or rows of it at `at`; does not block.

    A whole value may be smaller than its allocation: hidden states shrink
    to one token after the prefill.
    """

  def sent_nbytes(self, key: Key, value: Value, at: At | None) -> int:
    """Returns the bytes that such a write moves."""
    del key, at
    return sum(v.nbytes for v in value.values())

  @abc.abstractmethod
  def written(self, key: Key) -> Any:
    """Returns what is ready once the latest write to `key` has ended.

    Arrays, which the next write may donate, or a function that waits and
    raises what the write has raised.
    """

  def stored_nbytes(self, key: Key, rows: int | None = None) -> int:
    """Returns the bytes that reading the first `rows` rows of `key` takes."""
    del rows
    return self.sizes[key]

  @abc.abstractmethod
  def close(self) -> None:
    """Forgets every value; the tier is of no use afterwards."""

  @abc.abstractmethod
  def wait(self) -> None:
    """Blocks until every write so far can be relied on."""

  def _count(self, change: int) -> None:
    self.nbytes += change
    self.peak_nbytes = max(self.peak_nbytes, self.nbytes)


Updater = Callable[[Value, Value, jax.Array], dict[str, jax.Array]]


def make_updater(axis: int) -> Updater:
  """Returns a jitted in-place write along `axis`; the target is donated.

  All arrays of a value go in one call, and rows may lie in another memory of
  the target's device.
  """

  def one(target: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    rows = rows.astype(target.dtype)
    space = jax.typeof(target).memory_space
    if jax.typeof(rows).memory_space != space:  # else it would be a copy
      rows = jax.device_put(rows, space)
    return jax.lax.dynamic_update_slice_in_dim(target, rows, index, axis)

  def update(target: Value, rows: Value, index: jax.Array):
    return {name: one(target[name], rows[name], index) for name in target}

  return jax.jit(update, donate_argnums=0)
