"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

_STANDARD = {'/dev/stdout': 1, '/dev/stderr': 2}


def write(
  path: str | Path,
  parts: Iterable[str],
  *,
  sync: bool = False,
  alone: bool = False,
) -> None:
  """Writes a text file; one that was there stays until the new one is whole.

  What a link points to is written; what is no file, such as a device or a
  pipe, is written to as it is, and so is a standard stream by its name.

  Args:
    sync: it is on the disk, under its name, when this returns.
    alone: no other process writes this file meanwhile, so that all may write
      under one name first: what a killed one has left, the next one takes up.

  Raises:
    OSError: it cannot be written.
  """
  if (standard := _STANDARD.get(str(path))) is not None:
    # By number: opened by name, a file behind it would be written from its top.
    sys.stdout.flush()
    with open(os.dup(standard), 'w', encoding='utf-8') as file:
      file.writelines(parts)
    return
  if os.path.exists(path) and not os.path.isfile(path):
    with open(path, 'w', encoding='utf-8') as file:
      file.writelines(parts)
    return
  with (
    replaced(path, sync=sync, alone=alone) as new,
    open(new, 'w', encoding='utf-8') as file,
  ):
    file.writelines(parts)


@contextlib.contextmanager
def replaced(
  path: str | Path, *, sync: bool = False, alone: bool = False
) -> Iterator[Path]:
  """Yields where to write a file, which then takes the place of one that was
  there; after an exception that one stays. For the rest see `write`."""
  path = Path(os.path.realpath(path))
  number = uuid.uuid5(uuid.NAMESPACE_OID, path.name) if alone else uuid.uuid4()
  new = path.with_name(f'.flexjax-{number.hex}.new')
  if alone:
    new.unlink(missing_ok=True)  # of another user it cannot be opened
  try:
    yield new
    if sync:
      _sync(new)
    new.replace(path)
    if sync:
      _sync_directory(path.parent)
  except BaseException:
    new.unlink(missing_ok=True)
    raise


def _sync(path: Path) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


def _sync_directory(path: Path) -> None:
  """Makes names that have come or gone last, where the system can be asked to;
  some file systems of networks cannot."""
  try:
    _sync(path)
  except OSError as e:
    if e.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
