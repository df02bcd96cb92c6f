"""A job's input: what is in it, and how it goes by in windows of lines."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexjax.apps import requests
from flexjax.apps.requests import Asked
from flexjax.config import SamplingParams
from flexjax.errors import InputError

WINDOW = 4096  # requests


@dataclasses.dataclass(frozen=True)
class Survey:
  """What a first look at the input says: requests, and a digest of it all."""

  lines: int
  digest: str


def survey(path: Path) -> Survey:
  """Reads the input once, in bounded memory.

  Raises:
    InputError: it cannot be read, or has no requests.
  """
  digest, lines = hashlib.sha256(), 0
  try:
    with open(path, 'rb') as file:
      for line in file:
        digest.update(line)
        lines += bool(line.strip())
  except OSError as e:
    raise InputError(f"--input '{path}' cannot be read: {e}") from None
  if not lines:
    raise InputError(f"--input '{path}' holds no requests")
  return Survey(lines, digest.hexdigest())


def windows(path: Path, default: SamplingParams) -> Iterator[list[Asked]]:
  """Yields the input's requests, WINDOW at a time, in bounded memory.

  Args:
    default: of plain lines, for what they leave out.
  """
  names, like = _Names(), _is_batch(path)
  window: list[Asked] = []
  index = 0
  with open(path, 'rb') as file:
    for line in file:
      if not line.strip():
        continue
      window.append(requests.parse(index, line, default, like))
      index += 1
      if len(window) == WINDOW:
        yield names.without_doubles(window)
        window = []
  if window:
    yield names.without_doubles(window)


def _is_batch(path: Path) -> bool:
  """Whether the first line that is an object is one of OpenAI's."""
  with open(path, 'rb') as file:
    for line in file:
      try:
        fields = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(fields, dict):
        return requests.is_batch(fields)
  return False


class _Names:
  """Which `custom_id`s there have been: 8 bytes for each."""

  def __init__(self) -> None:
    self._seen = np.zeros(0, np.uint64)

  def without_doubles(self, window: list[Asked]) -> list[Asked]:
    """Returns a window with those refused whose name was taken before."""
    out, mine = [], set()
    for one in window:
      if one.custom_id is None:
        out.append(one)
        continue
      digest = hashlib.blake2b(
        one.custom_id.encode('utf-8', 'surrogatepass'), digest_size=8
      ).digest()
      name = np.uint64(int.from_bytes(digest, 'little'))
      at = int(np.searchsorted(self._seen, name))
      taken = at < len(self._seen) and self._seen[at] == name
      if taken or name in mine:
        why = f"custom_id '{one.custom_id}' stands on an earlier line, too"
        one = one.refused(why, 'custom_id')
      mine.add(name)
      out.append(one)
    new = np.array(sorted(mine), np.uint64)
    self._seen = np.union1d(self._seen, new)
    return out
