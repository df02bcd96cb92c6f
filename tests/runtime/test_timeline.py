"""The file of a timeline: what viewers of traces rely on."""

import json

import pytest

from flexjax.runtime import timeline
from flexjax.runtime.timeline import TITLES, TRACKS, Span, named

SPANS = [
  Span('device', 'mlp 0.2.0', 10.0000030, 10.0000050, {'i': 0, 'j': 2, 'k': 0}),
  Span('cpu', 'attention 1.1.0', 10.0000050, 10.0000050),
  Span('host_to_device', 'load_weights 2', 10.0, 10.0000030, {'bytes': 123}),
  Span('device', 'mlp 0.2.1', 10.0000050, 10.1234567891),
]


def written(path, spans=SPANS, title='measured'):
  timeline.write(path, spans, title)
  return json.loads(path.read_text())['traceEvents']


def complete(events):
  return [e for e in events if e['ph'] == 'X']


def test_names():
  assert named('mlp', 3, 5, 0) == 'mlp 3.5.0'
  assert named('load_weights', 5) == 'load_weights 5'


def test_events_are_sorted_and_begin_at_0(tmp_path):
  events = complete(written(tmp_path / 'trace'))
  assert [e['name'] for e in events] == [
    'load_weights 2',
    'mlp 0.2.0',
    'mlp 0.2.1',
    'attention 1.1.0',
  ]
  assert [e['ts'] for e in events] == [0, 3, 5, 5]
  assert [e['dur'] for e in events] == [3, 2, 123451.789, 0]
  assert events[0]['args'] == {'bytes': 123}
  assert events[1]['args'] == {'i': 0, 'j': 2, 'k': 0}


@pytest.mark.parametrize('title', TITLES)
def test_tracks_and_process_are_named(tmp_path, title):
  events = written(tmp_path / 'trace', title=title)
  names = [e for e in events if e['name'] == 'thread_name']
  assert tuple(e['args']['name'] for e in names) == TRACKS
  order = [e for e in events if e['name'] == 'thread_sort_index']
  assert [e['tid'] for e in order] == [e['tid'] for e in names]
  indices = [e['args']['sort_index'] for e in order]
  assert indices == sorted(indices)
  (process,) = [e for e in events if e['name'] == 'process_name']
  assert process['args'] == {'name': title}
  track = {e['tid']: e['args']['name'] for e in names}
  assert [track[e['tid']] for e in complete(events)] == [
    'host_to_device',
    'device',
    'device',
    'cpu',
  ]


def test_files_can_be_merged(tmp_path):
  pids = [
    {e['pid'] for e in written(tmp_path / 'trace', title=title)}
    for title in TITLES
  ]
  assert pids == [{1}, {2}]


def test_no_spans(tmp_path):
  assert complete(written(tmp_path / 'trace', [])) == []


def test_too_many_spans(tmp_path, monkeypatch):
  monkeypatch.setattr(timeline, 'MAX_SPANS', 2)
  events = written(tmp_path / 'trace')
  assert [e['name'] for e in complete(events)] == [
    'load_weights 2',
    'mlp 0.2.0',
  ]
  assert events[0]['args'] == {'name': 'measured', 'truncated': 'after 2 spans'}


def test_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'trace'
  before = written(path)
  with pytest.raises(TypeError):
    timeline.write(
      path, [*SPANS, Span('cpu', 'x', 11, 12, {'i': object()})], 'measured'
    )
  assert json.loads(path.read_text())['traceEvents'] == before
  with pytest.raises(OSError, match='none'):
    timeline.write(tmp_path / 'none' / 'trace', SPANS, 'measured')
