"""Weights on their way into the tiers, in bounded memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from flexjax.runtime.folder import WeightFolder
from flexjax.runtime.store import Store
from flexjax.tiers.base import At, Spec, spec_bytes
from flexjax.tiers.disk import DiskTier, discard, read_pieces
from flexjax.typing import Piece, WeightSource


class HeldWeights:
  """A WeightSource of what a folder holds; of the rest, another one's.

  Args:
    complete: groups that the folder holds.
    specs: what they consist of.
    rest: None where the folder must hold everything.
  """

  def __init__(
    self,
    root: Path,
    fingerprint: str,
    complete: set[int] | frozenset[int],
    specs: Sequence[Spec],
    rest: WeightSource | None = None,
  ):
    self.fingerprint = fingerprint
    self._root, self._complete, self._specs = root, complete, specs
    self._rest = rest

  def pieces(self, group: int, dtype: Any) -> Iterator[Piece]:
    """Yields weight group `group` as it is stored.

    Raises:
      OSError: a file is missing or damaged.
    """
    if group in self._complete or self._rest is None:
      return read_pieces(self._root, ('weights', group), self._specs[group])
    return self._rest.pieces(group, dtype)


def read_group(
  source: WeightSource, group: int, spec: Spec, dtype: Any
) -> dict[str, np.ndarray]:
  """Returns a whole weight group, put together from its pieces."""
  arrays = {name: np.empty(s.shape, s.dtype) for name, s in spec.items()}
  for name, row, array in source.pieces(group, dtype):
    arrays[name][row : row + len(array)] = array
  return arrays


def write_disk(
  source: WeightSource,
  specs: Sequence[Spec],
  wanted: Sequence[int],
  dtype: Any,
  disk: DiskTier,
  folder: WeightFolder,
  on_group: Callable[[int], None] = lambda group: None,
) -> None:
  """Writes weight groups that are not complete yet, a piece at a time.

  Host memory holds one piece (32 MiB) and its way to the disk, whatever the
  model's size. Every wanted group is allocated in the tier afterwards.
  """
  lock = (
    nullcontext() if folder.complete.issuperset(wanted) else folder.locked()
  )
  with lock:
    for group in wanted:
      key = ('weights', group)
      if torn := group not in folder.complete:
        discard(disk.root, key, specs[group])  # of another model, perhaps
      disk.allocate(key, specs[group])
      if torn:
        for piece in source.pieces(group, dtype):
          disk.write(key, {piece.name: piece.array}, At(0, piece.row))
          disk.wait()
        folder.add(group)
      on_group(group)


def fill_memory(
  source: WeightSource,
  specs: Sequence[Spec],
  places: Mapping[int, str],
  dtype: Any,
  store: Store,
  threads: int,
  on_group: Callable[[int], None] = lambda group: None,
) -> None:
  """Brings weight groups into device and host memory, several at once.

  Biggest host groups go first: pinned memory is taken once and not moved.
  """

  def read(group: int) -> tuple[int, dict[str, np.ndarray]]:
    return group, read_group(source, group, specs[group], dtype)

  sizes = [spec_bytes(spec) for spec in specs]
  order = sorted(places, key=lambda g: (places[g] != 'host', -sizes[g]))
  with ThreadPoolExecutor(threads, 'flexjax-load') as pool:
    waiting = [pool.submit(read, g) for g in order[: threads + 1]]
    rest = iter(order[threads + 1 :])
    while waiting:
      group, arrays = waiting.pop(0).result()
      key = ('weights', group)
      store.allocate(key, specs[group], places[group])
      store.tiers[places[group]].write(key, arrays)
      on_group(group)
      if (following := next(rest, None)) is not None:
        waiting.append(pool.submit(read, following))
      del arrays
  for place in set(places.values()):
    store.tiers[place].wait()
