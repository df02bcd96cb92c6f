"""A results file that survives whatever stops the job that writes it.

Lines are appended and synced a block at a time; what is committed stands in a
small file beside the results, replaced whole. After a kill at any moment the
results are cut back to what was committed, and the job goes on from there.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flexjax.errors import InputError


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


def _read(path: Path) -> Any:
  """Returns what a journal holds; None where there is none."""
  try:
    state = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as e:
    raise InputError(f"'{path}' cannot be read: {e}") from None
  if not isinstance(state, dict) or state.keys() != {'about', 'bytes', 'done'}:
    raise InputError(f"'{path}' is no journal of a job")
  return state


class Journal:
  """The results of one job.

  Args:
    path: of the results; `path`.job beside it is this journal's own.
    about: what the job is: settings, and digests of what it reads. Another job
      is refused.

  Attributes:
    done: what was committed last, as it was given; None at the very start.

  Raises:
    InputError: another job is at work on it, or has been; the results are not a
      job's; or they cannot be written.
  """

  def __init__(self, path: Path, about: Mapping[str, Any]):
    self.path, self._state = path, state_of(path)
    self._about = json.loads(json.dumps(about))
    self.done: Any = None
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
    if state is None:
      if size:
        raise InputError(
          f"'{self.path}' holds something that is not this job's: move it, or "
          'give another --output'
        )
      self._size = 0
      self.commit([], None)
      return
    for name, value in self._about.items():
      if state['about'].get(name) != value:
        raise InputError(
          f"'{self.path}' was begun with another {name}: give the same again, "
          f"or another --output (or remove it and '{self._state}')"
        )
    self._size, self.done = state['bytes'], state['done']
    if size < self._size:
      raise InputError(
        f"'{self.path}' has lost lines: {size} bytes are left of {self._size} "
        f"that were written; remove it and '{self._state}' to start again"
      )
    self._file.truncate(self._size)

  def commit(self, lines: Sequence[str], done: Any) -> None:
    """Appends lines, for good, with what is done when they are there.

    Raises:
      OSError: they cannot be written.
    """
    data = ''.join(line + '\n' for line in lines).encode()
    if data:
      self._file.write(data)
      self._file.flush()
      os.fsync(self._file.fileno())
    self._size += len(data)
    self.done = done
    state = {'about': self._about, 'bytes': self._size, 'done': done}
    new = self._state.with_name(self._state.name + '.new')
    with open(new, 'w', encoding='utf-8') as file:
      json.dump(state, file)
      file.flush()
      os.fsync(file.fileno())
    new.replace(self._state)

  def close(self) -> None:
    """Lets other jobs have the results."""
    self._file.close()
