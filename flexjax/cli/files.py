"""Files that commands read and write: what is wrong with one is one line."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexjax.errors import InputError


def read_text(path: Path, name: str = 'input') -> str:
  """Returns the text of the file of flag --name, byte for byte.

  Raises:
    InputError: it cannot be read, or is not UTF-8.
  """
  try:
    return path.read_bytes().decode('utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f"--{name} '{path}' cannot be read: {e}") from None


def read_lines(path: Path, what: str) -> list[tuple[str, str]]:
  """Returns the lines of --input that are not blank, each with its place.

  Raises:
    InputError: the same, or there are none; `what` says of what.
  """
  # Not splitlines: JSON strings may hold what Unicode calls a line's end.
  text = read_text(path).removeprefix('\ufeff')  # Windows' mark of UTF-8
  lines = io.StringIO(text, newline=None)
  numbered = [
    (f'{path}:{n}', line.removesuffix('\n'))
    for n, line in enumerate(lines, 1)
    if line.strip()
  ]
  if not numbered:
    raise InputError(f"--input '{path}' holds no {what}")
  return numbered


def parse_object(where: str, line: str, field: str) -> dict[str, Any]:
  """Reads a line of JSONL; `where` names it in errors.

  Raises:
    InputError: it is not JSON, or no object with such a field.
  """
  try:
    fields = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise InputError(f'{where}: not JSON: {e}') from None
  if not isinstance(fields, dict) or field not in fields:
    raise InputError(f"{where}: not an object with a field '{field}'")
  return fields


def check_outputs(
  written: Mapping[str, str | None], read: Mapping[str, str | None]
) -> None:
  """Checks files by their flags' names, before anything is written.

  Raises:
    InputError: one cannot be written, or would overwrite another.
  """
  names = {identity(file): name for name, file in read.items() if file}
  for name, file in written.items():
    if file is None:
      continue
    same = identity(file)
    if same in names and (os.path.isfile(file) or not os.path.exists(file)):
      raise InputError(f'--{name} would overwrite --{names[same]}')
    names[same] = name
    check_writable(name, file)


def identity(file: str) -> Any:
  """What a file has in common with another name of it."""
  try:
    found = os.stat(file)
  except OSError:
    return os.path.realpath(file)
  return found.st_dev, found.st_ino


def check_writable(name: str, value: str | None) -> None:
  """Raises InputError where the file of flag --name cannot be written."""
  if value is None:
    return
  try:
    if os.path.exists(value) and not os.path.isfile(value):
      # Not opened: who reads a pipe would take an open and a close for its end.
      if os.path.isdir(value):
        raise IsADirectoryError('it is a directory')
      if not os.access(value, os.W_OK):
        raise PermissionError('it is not for this user')
      return
    path = Path(os.path.realpath(value))  # of a link what it points to
    new = not path.exists()
    with open(path, 'a'):
      pass
    if new:
      path.unlink()
    elif not os.access(path.parent, os.W_OK):
      raise PermissionError('its directory cannot be written')
  except OSError as e:
    raise InputError(f"--{name} '{value}' cannot be written: {e}") from None
