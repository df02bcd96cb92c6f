"""The manifest of a weight folder: the only word on what it holds.

It names the model, the format and every group that is complete, and is
replaced in one rename after a group has reached the disk. A killed conversion
is therefore a shorter list, never a lie.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flexjax import atomic
from flexjax.config import ModelConfig
from flexjax.data import tokenizer
from flexjax.errors import InputError
from flexjax.runtime.formats import Format

_VERSION = 2
_NAME = 'flexjax.json'
_WAVES = 'waves.npy'


@dataclasses.dataclass(frozen=True)
class Held:
  """What a weight folder's manifest says.

  Attributes:
    model: fingerprint of the weights' source.
    form: how they are stored.
    config: the model that they are of.
    complete: weight groups that are there.
    tokenizer: names of files that were copied beside them.
    waves: digest of what its keys have in common; None where it is not kept.
  """

  model: str
  form: Format
  config: ModelConfig
  complete: frozenset[int]
  waves: str | None
  tokenizer: tuple[str, ...]


def read_manifest(root: Path | None) -> Held | None:
  """Returns what a folder holds; None where it holds no weights.

  Raises:
    InputError: the manifest cannot be read, or is of another version.
  """
  if root is None or not (path := root / _NAME).exists():
    return None
  try:
    fields = json.loads(path.read_text())
    version = fields['version'] if 'version' in fields else fields['format']
    if version == _VERSION:
      return Held(
        fields['model'],
        Format.from_json(fields['format']),
        ModelConfig(**fields['config']),
        frozenset(map(int, fields['complete'])),
        fields['waves'],
        # Whoever wrote it: others' files are not deleted by these names.
        tuple(n for n in fields.get('tokenizer', ()) if n in tokenizer.FILES),
      )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise InputError(f"'{path}' cannot be read as a manifest: {e}") from None
  raise InputError(
    f"'{root}' was written by another version of flexjax (format {version}, "
    f'not {_VERSION}); delete it, or give another directory'
  )


def read_waves(root: Path, digest: str) -> np.ndarray:
  """Returns the waves that a folder keeps.

  Raises:
    OSError: they are missing or damaged.
  """
  path = root / _WAVES
  content = path.read_bytes() if path.exists() else b''
  if hashlib.sha256(content).hexdigest() != digest:
    raise OSError(
      f"'{path}' is missing or damaged; delete '{root}' and write it again"
    )
  return np.load(io.BytesIO(content))


class WeightFolder:
  """The weights below `root`, as they come.

  Attributes:
    claimed: the manifest is of these weights; else there is none, or other
      weights were to come and none did.
    complete, waves, tokenizer: as of `Held`.

  Raises:
    InputError: the folder holds other weights, or another version.
  """

  def __init__(self, root: Path, model: str, form: Format, config: ModelConfig):
    self.root = root
    self.form = form
    self._model, self._config = model, config
    self._read()

  def _read(self) -> None:
    self.claimed = False
    self.complete: set[int] = set()
    self.waves: str | None = None
    self.tokenizer: tuple[str, ...] = ()
    if (held := read_manifest(self.root)) is None:
      return
    self.tokenizer = held.tokenizer
    mine: dict[str, Any] = {'model': self._model, **self.form.to_json()}
    theirs = {'model': held.model, **held.form.to_json()}
    other = [n for n in mine | theirs if mine.get(n) != theirs.get(n)]
    if not other:
      self.claimed = True
      self.complete, self.waves = set(held.complete), held.waves
    elif held.complete:
      name = other[0]
      raise InputError(
        f"'{self.root}' holds weights of another model or kind ({name} is "
        f'{theirs.get(name)}, not {mine.get(name)}); give another '
        '--disk_dir or delete it'
      )

  def claim(self, names: Sequence[str]) -> None:
    """Names the model that is to come, and the tokenizer's files that come with
    it; deletes those that came with another one."""
    for name in set(self.tokenizer).difference(names):
      (self.root / name).unlink(missing_ok=True)
    self.tokenizer = tuple(names)
    self._write()

  def add(self, group: int) -> None:
    """Records that a group is complete and on the disk."""
    self.complete.add(group)
    self._write()

  def keep(self, waves: np.ndarray) -> None:
    """Keeps the waves of the keys."""
    buffer = io.BytesIO()
    np.save(buffer, waves)
    _write(self.root / _WAVES, buffer.getvalue())
    self.waves = hashlib.sha256(buffer.getvalue()).hexdigest()
    self._write()

  def forget(self) -> None:
    """Deletes all but the weights themselves; for a folder that is locked."""
    for name in (*self.tokenizer, _WAVES, _NAME):
      (self.root / name).unlink(missing_ok=True)
    self._read()

  def _write(self) -> None:
    fields: Mapping[str, Any] = {
      'version': _VERSION,
      'model': self._model,
      'format': self.form.to_json(),
      'config': dataclasses.asdict(self._config),
      'complete': sorted(self.complete),
      'waves': self.waves,
      'tokenizer': self.tokenizer,
    }
    _write(self.root / _NAME, json.dumps(fields).encode())
    self.claimed = True

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


def _write(path: Path, content: bytes) -> None:
  """Replaces a file of a folder that is locked."""
  with atomic.replaced(path, sync=True, alone=True) as new:
    new.write_bytes(content)
