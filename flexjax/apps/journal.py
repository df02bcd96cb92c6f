"""A results file that survives whatever stops the job that writes it.

Lines are appended and synced a block at a time; what is committed stands in a
small file beside the results, replaced whole. After a kill at any moment the
results are cut back to what was committed, and the job goes on from there.
Lines whose turn in the results has not come are kept aside in the same way.
"""

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexjax import atomic
from flexjax.errors import InputError

_STATE = ('about', 'bytes', 'kept', 'check', 'done')


def committed(path: Path) -> Any:
  """Returns what was committed last to the results at `path`; None if nothing
  was, or they are no job's.

  Raises:
    InputError: the journal cannot be read.
  """
  state = _read(state_of(path))
  return state and state['done']


def state_of(path: Path) -> Path:
  """Returns where the journal of the results at `path` is."""
  return path.with_name(path.name + '.job')


def kept_of(path: Path) -> Path:
  """Returns where lines are kept aside whose turn has not come."""
  return path.with_name(path.name + '.job.kept')


def check_target(path: Path) -> None:
  """Raises InputError where `path` is something else than a file."""
  if path.exists() and not path.is_file():
    raise InputError(f"results '{path}' cannot be written: it is not a file")


def _read(path: Path) -> Any:
  """Returns what a journal holds; None where there is none."""
  try:
    state = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as e:
    raise InputError(f"'{path}' cannot be read: {e}") from None
  if not isinstance(state, dict) or state.keys() != {*_STATE, 'digest'}:
    raise InputError(f"'{path}' is no journal of a job")
  if state.pop('digest') != _digest(state):
    raise InputError(f"'{path}' is damaged: it is not what a job wrote")
  return state


def _digest(state: Mapping[str, Any]) -> str:
  text = json.dumps([state[name] for name in _STATE])
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Journal:
  """The results of one job.

  Args:
    path: of the results; `path`.job and `path`.job.kept beside it are
      this journal's own.
    about: what the job is: settings, and digests of what it reads. Another job
      is refused.

  Attributes:
    done: what was committed last, as it was given; None at the very start.

  Raises:
    InputError: another job is at work on it, or has been; the results are not a
      job's; or they cannot be written.
  """

  def __init__(self, path: Path, about: Mapping[str, Any]):
    self.path, self._state, self._kept = path, state_of(path), kept_of(path)
    self._about = json.loads(json.dumps(about))
    self.done: Any = None
    self._failed = False
    check_target(path)
    if not path.exists() and (state := _read(self._state)):
      # Before there is a file: one that is empty must not be left behind, nor
      # removed, for by then it may be another job's.
      self._refuse_loss(path, 0, state['bytes'])
    try:
      self._file: IO[bytes] = open(path, 'ab')  # noqa: SIM115 (see `close`)
    except OSError as e:
      raise InputError(f"results '{path}' cannot be written: {e}") from None
    try:
      self._open()
    except BaseException:
      self._file.close()
      raise

  def _open(self) -> None:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise InputError(
        f"another job is writing '{self.path}': wait for it, or give this one "
        'another --output'
      ) from None
    size = os.fstat(self._file.fileno()).st_size
    state = _read(self._state)
    aside = self._kept.stat().st_size if self._kept.exists() else 0
    if state is None or (state['done'] is None and not size + aside):
      if size:
        raise InputError(
          f"'{self.path}' holds something that is not this job's: move it, or "
          'give another --output'
        )
      self._note(0, 0, 0, None)
      return
    for name, value in self._about.items():
      if state['about'].get(name) != value:
        raise InputError(
          f"'{self.path}' was begun with another {name}: give the same again, "
          f"or another --output (or remove it and '{self._state}')"
        )
    self._size, self._kept_size = state['bytes'], state['kept']
    self._check, self.done = state['check'], state['done']
    for file, left, written in (
      (self.path, size, self._size),
      (self._kept, aside, self._kept_size),
    ):
      self._refuse_loss(file, left, written)
    if zlib.crc32(self._kept_bytes()) != self._check:
      raise InputError(
        f"'{self._kept}' is damaged: remove '{self.path}' and '{self._state}' "
        'to start again'
      )
    self._file.truncate(self._size)

  def _refuse_loss(self, file: Path, left: int, written: int) -> None:
    if left < written:
      raise InputError(
        f"'{file}' has lost lines: {left} bytes are left of {written} that "
        f"were written; remove '{self.path}' and '{self._state}' to start again"
      )

  def commit(self, lines: Sequence[str], done: Any) -> None:
    """Appends lines, for good, with what is done when they are there; forgets
    what was kept.

    Raises:
      InputError: they cannot be written, or some before could not.
    """
    data = _text(lines)
    with self._whole():
      _append(self._file, data)
      self._note(self._size + len(data), 0, 0, done)
      self._kept.unlink(missing_ok=True)

  def keep(self, lines: Sequence[str], done: Any) -> None:
    """Likewise, but keeps the lines aside.

    Raises:
      InputError: they cannot be written, or some before could not.
    """
    data = _text(lines)
    with self._whole(), open(self._kept, 'ab') as file:
      file.truncate(self._kept_size)
      _append(file, data)
      check = zlib.crc32(data, self._check)
      self._note(self._size, self._kept_size + len(data), check, done)

  def kept(self) -> list[str]:
    """Returns the lines that have been kept since the last commit."""
    return self._kept_bytes().decode().split('\n')[:-1]

  def _kept_bytes(self) -> bytes:
    if not self._kept_size:
      return b''
    with open(self._kept, 'rb') as file:
      return file.read(self._kept_size)

  @contextmanager
  def _whole(self) -> Iterator[None]:
    """Lets nothing be written behind what may be half a write."""
    if self._failed:
      raise InputError(
        f"'{self.path}' could not be written before: open it anew"
      )
    self._failed = True
    try:
      yield
    except OSError as e:
      raise InputError(
        f"results '{self.path}' cannot be written: {e.strerror}; what is done "
        'is kept, and the same command goes on with it'
      ) from e
    self._failed = False

  def _note(self, size: int, kept_size: int, check: int, done: Any) -> None:
    values = self._about, size, kept_size, check, json.loads(json.dumps(done))
    state = dict(zip(_STATE, values, strict=True))
    text = json.dumps(state | {'digest': _digest(state)})
    atomic.write(self._state, [text], sync=True, alone=True)
    self._size, self._kept_size, self._check = size, kept_size, check
    self.done = done

  def close(self) -> None:
    """Lets other jobs have the results."""
    self._file.close()


def _text(lines: Sequence[str]) -> bytes:
  return ''.join(line + '\n' for line in lines).encode()


def _append(file: IO[bytes], data: bytes) -> None:
  """Writes and syncs."""
  if data:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
