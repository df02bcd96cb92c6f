"""Files that are written whole or not at all."""

import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_STANDARD = {'/dev/stdout': 1, '/dev/stderr': 2}


def write(
  path: str | Path, parts: Iterable[str], *, sync: bool = False
) -> None:
  """Writes a text file; one that was there stays until the new one is whole.

  What a link points to is written; what is no file, such as a device or a
  pipe, is written to as it is, and so is a standard stream by its name.

  Args:
    sync: it is on the disk, under its name, when this returns.

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
  path = Path(os.path.realpath(path))
  new = path.with_name(path.name + '.new')
  try:
    with open(new, 'w', encoding='utf-8') as file:
      file.writelines(parts)
      if sync:
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    if sync:
      _sync_directory(path.parent)
  except BaseException:
    new.unlink(missing_ok=True)
    raise


def _sync_directory(path: Path) -> None:
  """Makes names that have come or gone last, where the system can be asked to;
  some file systems of networks cannot."""
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  except OSError as e:
    if e.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(number)
