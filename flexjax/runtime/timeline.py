"""What a run did, or is predicted to do, as spans on tracks; and their file.

One format for both, so that they can be laid side by side in Perfetto or
chrome://tracing. Whoever measures or predicts knows nothing of the file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flexjax import atomic
from flexjax.hardware import LINKS

TRACKS = (
  'dispatch',
  'disk_to_host',
  'host_to_device',
  'device',
  'device_to_host',
  'host_to_disk',
  'cpu',
)
TITLES = ('measured', 'predicted')
MAX_SPANS = 1_000_000  # about half a GiB of them
assert set(LINKS) < set(TRACKS)


class Span(NamedTuple):
  """Something that one track was busy with.

  Attributes:
    track: of TRACKS.
    name: see `named`.
    begin, end: seconds since any one moment.
    args: i, j and k of a cell, bytes of what crossed a link.
  """

  track: str
  name: str
  begin: float
  end: float
  args: Mapping[str, Any] = {}


def named(what: str, *numbers: Any) -> str:
  """Returns a span's name, such as 'mlp 3.5.0' or 'load_weights 5'."""
  return f'{what} {".".join(map(str, numbers))}'


def write(path: str | Path, spans: Iterable[Span], title: str) -> None:
  """Writes a Chrome trace, whole or not at all: an event per line.

  Times begin at 0. The first MAX_SPANS spans are written, and what is left
  out is said.

  Args:
    title: of TITLES; files of different titles may be merged.

  Raises:
    OSError: it cannot be written.
  """
  atomic.write(path, _text(spans, title))


def _text(spans: Iterable[Span], title: str) -> Iterator[str]:
  yield '{"displayTimeUnit": "ms", "traceEvents": ['
  before = '\n'
  for event in _events(spans, TITLES.index(title)):
    yield before + json.dumps(event)
    before = ',\n'
  yield '\n]}\n'


def _events(spans: Iterable[Span], process: int) -> Iterator[dict[str, Any]]:
  order = {track: n for n, track in enumerate(TRACKS)}
  spans = sorted(spans, key=lambda s: (s.begin, order[s.track], s.end))
  about: dict[str, Any] = {'name': TITLES[process]}
  if len(spans) >= MAX_SPANS:
    about['truncated'] = f'after {MAX_SPANS} spans'
    del spans[MAX_SPANS:]
  pid = process + 1
  yield {'ph': 'M', 'name': 'process_name', 'pid': pid, 'args': about}
  for track, tid in order.items():
    head = {'ph': 'M', 'pid': pid, 'tid': tid}
    yield head | {'name': 'thread_name', 'args': {'name': track}}
    yield head | {'name': 'thread_sort_index', 'args': {'sort_index': tid}}
  origin = spans[0].begin if spans else 0.0
  for span in spans:
    begin, end = (_micro(t - origin) for t in (span.begin, span.end))
    yield {
      'ph': 'X',
      'name': span.name,
      'pid': pid,
      'tid': order[span.track],
      'ts': begin,
      'dur': round(end - begin, 3),
      'args': dict(span.args),
    }


def _micro(seconds: float) -> float:
  return round(1e6 * seconds, 3)
