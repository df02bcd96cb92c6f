"""Weights on their way into the tiers, and the folder that keeps them.

A weight folder's manifest is the only word on what it holds: it names the
model, the format and every group that is complete, and is replaced in one
rename after a group has reached the disk. A killed conversion is therefore a
shorter list, never a lie.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexjax.errors import InputError
from flexjax.runtime.store import Store
from flexjax.tiers.base import At, Spec, spec_bytes
from flexjax.tiers.disk import DiskTier
from flexjax.typing import Shapes, WeightSource

FORMAT = 1
MANIFEST = 'flexjax.json'


class WeightFolder:
  """The manifest of the weights below `root`.

  Args:
    root: the disk tier's directory.
    identity: what the weights are: model, source, dtype.

  Raises:
    InputError: the folder holds other weights, or another format.
  """

  def __init__(self, root: Path, identity: Mapping[str, Any]):
    self.root = root
    self.identity = {'format': FORMAT, **identity}
    self.complete: set[int] = set()
    self._read()

  def _read(self) -> None:
    root, path = self.root, self.root / MANIFEST
    if not path.exists():
      return
    try:
      held = json.loads(path.read_text())
      found = {name: held.get(name) for name in self.identity}
      self.complete = set(held['complete'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
      raise InputError(f"'{path}' cannot be read as a manifest: {e}") from None
    for name, mine in self.identity.items():
      if found[name] != mine:
        raise InputError(
          f"disk_dir '{root}' holds weights of another model or version "
          f'({name} is {found[name]}, not {mine}); give another --disk_dir or '
          'delete it'
        )

  def add(self, group: int) -> None:
    """Records that a group is complete and on the disk."""
    self.complete.add(group)
    path = self.root / MANIFEST
    new = path.with_suffix('.new')
    text = json.dumps(self.identity | {'complete': sorted(self.complete)})
    with open(new, 'w') as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    new.replace(path)

  @contextmanager
  def locked(self):
    """Lets one process at a time write; others wait for what it leaves.

    Raises:
      InputError: it has left other weights.
    """
    directory = os.open(self.root, os.O_RDONLY)
    try:
      fcntl.flock(directory, fcntl.LOCK_EX)
      self._read()
      yield
    finally:
      os.close(directory)


def identity(source: Any, dtype: str) -> dict[str, str]:
  """What tells the weights of `source` in `dtype` from any others."""
  return {'model': source.weights.fingerprint, 'dtype': dtype}


def held_dtype(root: Path | None) -> str | None:
  """Returns the dtype of the weights that a folder already holds."""
  try:
    assert root is not None
    return json.loads((root / MANIFEST).read_text()).get('dtype')
  except (AssertionError, OSError, ValueError, AttributeError):
    return None


def specs(shapes: Shapes, dtype: Any) -> Spec:
  return {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()}


def group_bytes(groups: Sequence[Shapes], dtype: Any) -> list[int]:
  """Returns the bytes of every weight group in `dtype`."""
  return [spec_bytes(specs(shapes, dtype)) for shapes in groups]


def write_disk(
  source: WeightSource,
  groups: Sequence[Shapes],
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
      disk.allocate(key, specs(groups[group], dtype))
      if group not in folder.complete:
        for piece in source.pieces(group, dtype):
          disk.write(key, {piece.name: piece.array}, At(0, piece.row))
          disk.wait()
        folder.add(group)
      on_group(group)


def fill_memory(
  source: WeightSource,
  groups: Sequence[Shapes],
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
    arrays = {n: np.empty(s, dtype) for n, s in groups[group].items()}
    for name, row, array in source.pieces(group, dtype):
      arrays[name][row : row + len(array)] = array
    return group, arrays

  sizes = group_bytes(groups, dtype)
  order = sorted(places, key=lambda g: (places[g] != 'host', -sizes[g]))
  with ThreadPoolExecutor(threads, 'flexjax-load') as pool:
    waiting = [pool.submit(read, g) for g in order[: threads + 1]]
    rest = iter(order[threads + 1 :])
    while waiting:
      group, arrays = waiting.pop(0).result()
      key = ('weights', group)
      store.allocate(key, specs(groups[group], dtype), places[group])
      store.tiers[places[group]].write(key, arrays)
      on_group(group)
      if (following := next(rest, None)) is not None:
        waiting.append(pool.submit(read, following))
      del arrays
  for place in set(places.values()):
    store.tiers[place].wait()
