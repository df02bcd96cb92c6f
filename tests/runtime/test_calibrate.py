"""Calibration: a record that is whole, kept, found again, and repaired."""

import dataclasses
import itertools
import json
import logging
import math
import time
from pathlib import Path

import jax
import pytest

from flexjax import hardware
from flexjax.config import DTYPE_BYTES, QUERY_CHUNK
from flexjax.errors import InputError
from flexjax.hardware import DISPATCHED, LINKS, Curve, Family, Hardware
from flexjax.policy.charges import computed_scores
from flexjax.runtime import calibrate, devices
from flexjax.runtime.timing import contention, layers, links, stopwatch
from flexjax.runtime.timing.points import points
from flexjax.runtime.timing.stopwatch import Stopwatch

SECONDS = Curve(((1.0, 1e-3), (100.0, 1e-2)))
FAMILY = Family(((64, SECONDS),))


@dataclasses.dataclass(frozen=True)
class Measured:
  record: Hardware
  disk_dir: Path
  progress: list[tuple[str, int, int]]


@pytest.fixture(scope='session')
def measured(tmp_path_factory):
  """This machine, measured once."""
  disk_dir, progress = tmp_path_factory.mktemp('disk'), []
  record = calibrate.measure(
    disk_dir=disk_dir, quick=True, on_progress=lambda *a: progress.append(a)
  )
  return Measured(record, disk_dir, progress)


@pytest.fixture
def machine():
  return devices.machine()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('FLEXJAX_CACHE_DIR', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def asked(measured, monkeypatch):
  """How often the machine is measured; a prepared record is the answer."""
  calls = []

  def answer(machine, disk_dir, quick, on_progress):
    calls.append((disk_dir, quick))
    return without_disk(measured.record)

  monkeypatch.setattr(calibrate, '_measure', answer)
  return calls


def without_disk(record):
  links = {n: c for n, c in record.links.items() if 'disk' not in n}
  return dataclasses.replace(
    record, links=links, disk_space=0, contention={}, alone={}, fresh={}
  )


def curves(value):
  if isinstance(value, Curve):
    yield value
  elif isinstance(value, Family):
    for _, curve in value.curves:
      yield curve
  elif isinstance(value, dict):
    for part in value.values():
      yield from curves(part)


def test_every_field_is_measured(measured):
  record = measured.record
  assert set(record.links) == {'disk_to_host', 'host_to_disk'}
  assert set(record.alone) == set(record.fresh) == {'disk_to_host'}
  assert set(record.mlp) == {'float32', 'bfloat16'}
  assert set(record.prefill_attention) == set(record.mlp)
  assert set(record.decode_attention) == set(record.mlp)
  assert record.host_attention == {}
  assert set(record.expand) == set(record.pack) == {'4', '8'}
  assert set(record.row_write) == {'device', 'host', 'disk'}
  assert set(record.dispatch) == set(DISPATCHED)
  assert set(record.contention) == {'disk_to_host', 'host_to_disk'}
  assert 0 <= record.contention['disk_to_host'] <= 1
  assert record.unified
  assert record.platform == 'cpu'
  assert min(record.device_memory, record.host_memory, record.disk_space) > 0
  assert record.name
  assert 'flexjax calibrate --quick' in record.source


def test_every_time_is_positive(measured):
  found = [
    curve
    for field in dataclasses.fields(Hardware)
    for curve in curves(getattr(measured.record, field.name))
  ]
  assert len(found) >= 16
  assert all(0 < y < math.inf for curve in found for _, y in curve.points)
  assert all(seconds > 0 for seconds in measured.record.dispatch.values())


def test_a_record_survives_json(measured, tmp_path):
  hardware.write(tmp_path / 'record.json', measured.record)
  again = hardware.read(tmp_path / 'record.json')
  assert again.to_json() == measured.record.to_json()


def test_nothing_is_left_on_disk(measured):
  assert list(measured.disk_dir.iterdir()) == []


def test_nothing_is_left_on_disk_by_an_error(tmp_path, monkeypatch, machine):
  def fail(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr('flexjax.runtime.timing.disks._disk_write', fail)
  with pytest.raises(KeyboardInterrupt):
    calibrate.measure(disk_dir=tmp_path, quick=True)
  assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='file'):
    calibrate.measure(disk_dir=tmp_path / 'file', quick=True)


def test_progress_counts_to_the_end(measured):
  names, done, totals = zip(*measured.progress, strict=True)
  assert set(names) == {'calibrate'}
  assert list(done) == list(range(totals[0] + 1))
  assert set(totals) == {done[-1]}


def test_the_cache_path_follows_the_environment(machine, monkeypatch):
  monkeypatch.setenv('HOME', '/home/someone')
  monkeypatch.setenv('XDG_CACHE_HOME', '')
  monkeypatch.delenv('FLEXJAX_CACHE_DIR', raising=False)
  path = calibrate.cache_path(machine)
  assert path.parent == Path('/home/someone/.cache/flexjax')
  assert path.name.startswith('hardware-')
  assert path.suffix == '.json'
  monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
  assert calibrate.cache_path(machine).parent == Path('/caches/flexjax')
  monkeypatch.setenv('FLEXJAX_CACHE_DIR', '/own')
  assert calibrate.cache_path(machine) == Path('/own') / path.name


def test_a_machine_is_measured_once(cache, asked, machine):
  first, fresh = calibrate.load_or_measure(machine, None)
  assert fresh
  assert calibrate.cache_path(machine).parent == cache
  second, fresh = calibrate.load_or_measure(machine, None)
  assert not fresh
  assert asked == [(None, True)]
  assert second.to_json() == first.to_json()


@pytest.mark.parametrize(
  'text',
  ['', '{"name": "x"', '{"name": "x"}', '[]', '\ufffd'],
  ids=['empty', 'cut off', 'fields missing', 'a list', 'not JSON'],
)
def test_a_broken_record_is_replaced(text, cache, asked, machine):
  path = calibrate.cache_path(machine)
  path.parent.mkdir(parents=True)
  path.write_text(text)
  _, fresh = calibrate.load_or_measure(machine, None)
  assert fresh
  assert len(asked) == 1
  hardware.read(path)


def test_a_record_that_is_not_text_is_replaced(cache, asked, machine):
  path = calibrate.cache_path(machine)
  path.parent.mkdir(parents=True)
  path.write_bytes(b'\xff\xfe\x00')
  assert calibrate.load_or_measure(machine, None)[1]
  hardware.read(path)


def test_a_cache_that_cannot_be_written_stops_nothing(
  tmp_path, monkeypatch, asked, machine, caplog
):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('FLEXJAX_CACHE_DIR', str(tmp_path / 'file'))
  with caplog.at_level(logging.WARNING):
    record, fresh = calibrate.load_or_measure(machine, None)
  assert fresh
  assert record.mlp
  assert 'cannot be kept' in caplog.text


def test_a_disk_is_added_to_a_record_without_one(
  cache, asked, machine, tmp_path
):
  calibrate.load_or_measure(machine, None)
  disk = tmp_path / 'disk'
  record, fresh = calibrate.load_or_measure(machine, disk)
  assert fresh
  assert asked == [(None, True)]  # the rest is kept
  assert {'disk_to_host', 'host_to_disk'} <= set(record.links)
  assert record.disk_space > 0
  assert not disk.exists()
  again, fresh = calibrate.load_or_measure(machine, disk)
  assert not fresh
  assert set(again.links) == set(record.links)
  # Who has no disk tier has no disk space, whatever the record says.
  assert calibrate.load_or_measure(machine, None)[0].disk_space == 0


def test_memories_are_those_of_now(cache, asked, machine):
  calibrate.load_or_measure(machine, None)
  smaller = dataclasses.replace(machine, device_memory=10**9)
  record, fresh = calibrate.load_or_measure(smaller, None)
  assert not fresh
  assert record.device_memory == 10**9


def test_scores_are_those_that_are_computed():
  c = QUERY_CHUNK
  assert computed_scores(64) == 64 * 64
  assert computed_scores(2 * c) == c * c + c * 2 * c
  assert computed_scores(c + 8) == c * c + 8 * (c + 8)


@pytest.mark.parametrize('quick', [False, True])
@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_amounts_rise(platform, quick):
  todo = points(platform, quick)
  for name in ('widths', 'rows', 'matrix_rows', 'picked', 'link_bytes'):
    assert list(getattr(todo, name)) == sorted(set(getattr(todo, name)))
  for name in ('disk_widths', 'disk_writes'):
    assert list(getattr(todo, name)) == sorted(set(getattr(todo, name)))
  for name in ('caches', 'host_caches', 'new_rows', 'written'):
    sizes = [math.prod(shape) for shape in getattr(todo, name)]
    assert sizes == sorted(set(sizes))
  for sizes in todo.prompts.values():
    scores = [b * n * computed_scores(t) for b, n, t in sizes]
    assert scores == sorted(set(scores))


def test_the_cpu_is_timed_with_caches_that_it_attends_to(machine):
  """Beside an accelerator, as which the CPU itself has to do."""
  beside = dataclasses.replace(machine, unified=False)
  todo = dataclasses.replace(points('cpu', True), host_caches=((1, 2, 16, 8),))
  found = layers.host_attention(Stopwatch(beside, 0.0), todo)
  assert set(found) == set(devices.ATTENDED)
  for dtype, curve in found.items():
    assert [x for x, _ in curve.points] == [512 * DTYPE_BYTES[dtype]]
  assert layers.host_attention(Stopwatch(machine, 0.0), todo) == {}


def test_written_rows_are_counted_as_a_cache_keeps_them(machine):
  todo = dataclasses.replace(points('cpu', True), written=((1, 2, 4, 8),))
  found = links.row_write(Stopwatch(machine, 0.0), todo)
  assert set(found) == {'device', 'host'}
  for curve in found.values():
    ((nbytes, _),) = curve.points
    assert nbytes == 128 * DTYPE_BYTES[devices.ATTENDED[-1]]
  beside = dataclasses.replace(machine, unified=False)
  found = links.row_write(Stopwatch(beside, 0.0), todo)
  assert set(found) == {'device', 'host', 'cpu'}


def test_computing_loses_to_every_link_there_is(machine, tmp_path):
  todo = dataclasses.replace(points('cpu', True), contending_bytes=2**20)
  beside = dataclasses.replace(machine, unified=False)
  for there, root, expected in (
    (machine, None, set()),
    (machine, tmp_path, {'host_to_disk', 'disk_to_host'}),
    (beside, None, {'host_to_device', 'device_to_host'}),
    (beside, tmp_path, set(LINKS)),
  ):
    found = contention.losses(Stopwatch(there, 0.0), todo, root)
    assert set(found) == expected
    assert all(0 <= part <= 1 for part in found.values())
  assert not list(tmp_path.iterdir())


def test_a_small_device_is_measured_with_little(machine):
  small = dataclasses.replace(machine, device_memory=4 * 10**8)
  watch = Stopwatch(small, 0.0)
  todo = dataclasses.replace(
    points('cpu', True), dtypes=('float32',), widths=(64, 4096), rows=(1, 10**6)
  )
  (family,) = layers.mlp(watch, todo).values()
  ((width, curve),) = family.curves
  assert width == 64
  assert [rows for rows, _ in curve.points] == [1]


def test_what_times_an_accelerator_runs_on_any_backend(machine, monkeypatch):
  monkeypatch.setattr(stopwatch, '_HEAD_START_SIZE', 64)
  other = dataclasses.replace(machine, platform='gpu')
  watch = Stopwatch(other, 0.0)
  x = watch.numbers((8,), 'float32')
  assert watch.on_device(lambda n: x + n) > 0


def test_what_compiles_is_not_in_an_accelerators_seconds(machine, monkeypatch):
  monkeypatch.setattr(stopwatch, '_HEAD_START_SIZE', 8)
  monkeypatch.setattr(stopwatch, '_MOST_RUNS', 1)  # the first is all there is
  jit, products = jax.jit, []

  def slow_to_compile(function):
    compiled = jit(function)

    def call(x):
      if not products:
        time.sleep(0.5)
      products.append(x)
      return compiled(x)

    return call

  monkeypatch.setattr(jax, 'jit', slow_to_compile)
  watch = Stopwatch(dataclasses.replace(machine, platform='gpu'), 0.0)
  assert watch.on_device(lambda n: time.sleep(0.01)) > 1e-3
  # Nor in those of a product, of which there would be one.
  products.clear()
  watch._head_start()
  assert len(products) > 1


def test_what_seems_to_take_no_time_is_tried_again(machine, monkeypatch):
  """Others' work beside the head start may take longer than the calls."""
  monkeypatch.setattr(stopwatch, '_HEAD_START_SIZE', 8)
  watch = Stopwatch(dataclasses.replace(machine, platform='gpu'), 0.0)
  seen = itertools.chain([1.05, 1.01] * 3, itertools.cycle([1.0, 1.01]))
  turns = []

  def disturbed_thrice(run):
    turns.append(run)
    return next(seen)

  monkeypatch.setattr(watch, '_after_head_start', disturbed_thrice)
  seconds = watch.on_device(lambda n: n, lambda x: None)
  assert seconds == pytest.approx(0.01)
  assert len(turns) == 2 * 7  # the fourth of seven is the median


def test_what_takes_no_time_is_tried_so_often(machine, monkeypatch):
  monkeypatch.setattr(stopwatch, '_HEAD_START_SIZE', 8)
  watch, turns = Stopwatch(dataclasses.replace(machine, platform='gpu'), 0), []
  monkeypatch.setattr(
    watch, '_after_head_start', lambda run: turns.append(run) or 1.0
  )
  assert watch.on_device(lambda n: n, lambda x: None) == stopwatch._LEAST
  assert len(turns) == 2 * stopwatch._MOST_RUNS


def test_computing_beside_a_transfer_comes_to_an_end(machine, monkeypatch):
  """Also where a call seems to take no time, so that any number would fit."""
  watch, calls = Stopwatch(machine, 0.0), []
  monkeypatch.setattr(watch, 'on_device', lambda call: 1e-7)
  contention._lost(watch, calls.append, lambda: lambda: time.sleep(0.01))
  assert len(calls) == 2 * contention._TURNS * contention._MOST_CALLS


def test_the_record_is_plain_json(measured):
  json.dumps(measured.record.to_json(), allow_nan=False)
