"""A machine's record: curves, families, JSON, and the records that ship."""

import copy
import csv
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import hardware
from flexjax.errors import InputError
from flexjax.hardware import Curve, Family, Hardware

CONFIGS = Path(__file__).parent.parent / 'configs' / 'hardware'
RECORDS = sorted(CONFIGS.glob('*.json'))
MISSING = object()

OPTIONAL = ('contention', 'alone', 'fresh')

LINE = [[1, 1e-5], [1000, 1e-3]]
FIELDS = {
  'name': 'a machine',
  'source': 'thin air',
  'platform': 'gpu',
  'unified': False,
  'device_memory': 16 * 2**30,
  'host_memory': 64 * 2**30,
  'disk_space': 10**12,
  'links': dict.fromkeys(hardware.LINKS, LINE),
  'mlp': {'float32': {'768': LINE, '2048': LINE}, 'bfloat16': {'768': LINE}},
  'prefill_attention': {'float32': {'64': LINE}, 'bfloat16': {'64.5': LINE}},
  'decode_attention': {'float32': LINE, 'bfloat16': LINE},
  'host_attention': {'float32': LINE},
  'expand': {'4': LINE, '8': LINE},
  'pack': {'4': LINE, '8': LINE},
  'row_write': {'device': LINE, 'host': LINE},
  'pick': LINE,
  'dispatch': {'compute': 1e-4, 'read': 5e-5, 'write': 0},
  'contention': {'host_to_device': 0.1},
  'alone': {'disk_to_host': LINE},
  'fresh': {'disk_to_host': LINE},
}

POSITIVE = st.floats(1e-9, 1e12)


@st.composite
def curves(draw):
  """Curves whose seconds rise with the amount, or stay."""
  size = draw(st.integers(1, 6))
  amounts = st.lists(POSITIVE, min_size=size, max_size=size, unique=True)
  seconds = st.lists(POSITIVE, min_size=size, max_size=size)
  xs, ys = sorted(draw(amounts)), sorted(draw(seconds))
  return Curve(tuple(zip(xs, ys, strict=True)))


def family(*curves):
  return Family(tuple((size, Curve(points)) for size, points in curves))


@given(curves())
def test_a_curve_goes_through_its_points(curve):
  for amount, seconds in curve.points:
    assert curve(amount) == pytest.approx(seconds, rel=1e-6)


@given(curves(), POSITIVE, POSITIVE)
def test_more_work_never_takes_less_time(curve, a, b):
  few, many = sorted((a, b))
  assert 0 < curve(few) <= curve(many) * (1 + 1e-9)


def test_between_two_points_seconds_follow_a_power():
  curve = Curve(((1, 2), (100, 20000)))  # 2 x^2
  assert curve(10) == pytest.approx(200)
  assert curve(3) == pytest.approx(18)


def test_beyond_its_points_a_curve_stays_or_goes_on():
  curve = Curve(((10, 3), (20, 4), (30, 6)))
  assert curve(1) == 3
  assert curve(40) == pytest.approx(8)
  assert Curve(((10, 3),))(25) == pytest.approx(7.5)
  assert Curve(((10, 3), (20, 2)))(30) == 2  # noise does not go below 0


def test_nothing_takes_no_time():
  curve = Curve(((10, 3), (20, 4)))
  assert curve(0) == curve(-1) == 0
  assert family((64, curve.points))(64, 0, 2) == pytest.approx(0, abs=1e-200)


@pytest.mark.parametrize(
  'points',
  [
    (),
    ((1, 1), (1, 2)),
    ((2, 1), (1, 2)),
    ((0, 1),),
    ((-1, 1),),
    ((1, 0),),
    ((1, -1),),
    ((1, math.nan),),
    ((math.inf, 1),),
  ],
)
def test_points_that_make_no_curve_are_refused(points):
  with pytest.raises(InputError, match='curve'):
    Curve(points)


@pytest.mark.parametrize('size', [768, 900, 2048, 500, 4096])
def test_a_family_knows_what_goes_with_a_power_of_the_size(size):
  squares = family(
    *((s, ((1, 1e-9 * s**2), (64, 64e-9 * s**2))) for s in (768, 2048))
  )
  assert squares(size, 8, 2) == pytest.approx(8e-9 * size**2)


def test_a_family_interpolates_between_sizes():
  steps = family((64, ((1, 1),)), (256, ((1, 16),)))
  assert steps(128, 1, 0) == pytest.approx(4)
  assert steps(32, 1, 0) == 1
  assert steps(512, 1, 0) == 16
  assert steps(512, 1, 1) == pytest.approx(32)


@pytest.mark.parametrize(
  'sizes', [(), (0,), (-1,), (2, 1), (1, 1), (math.nan,), (1, math.inf)]
)
def test_sizes_that_make_no_family_are_refused(sizes):
  with pytest.raises(InputError, match='sizes'):
    family(*((size, ((1, 1),)) for size in sizes))


def test_a_record_survives_json():
  record = Hardware.from_json(json.loads(json.dumps(FIELDS)))
  again = Hardware.from_json(json.loads(json.dumps(record.to_json())))
  assert again == record
  assert again.to_json() == FIELDS


def test_counts_that_are_close_stay_apart_in_json():
  fields = FIELDS | {'pick': [[1000001, 0.1], [1000002, 0.123456789]]}
  record = Hardware.from_json(fields)
  assert record.to_json()['pick'] == [[1000001, 0.1], [1000002, 0.12346]]
  sizes = {'1234567': LINE, '1234568': LINE}
  fields = FIELDS | {'mlp': {'float32': sizes}}
  assert Hardware.from_json(fields).to_json()['mlp']['float32'] == sizes


@pytest.mark.parametrize('name', OPTIONAL)
def test_some_fields_may_be_left_out(name):
  fields = {k: v for k, v in FIELDS.items() if k != name}
  assert getattr(Hardware.from_json(fields), name) == {}


def test_a_lone_transfer_may_take_its_own_time():
  slow = {'disk_to_host': [[10, 0.5]]}
  record = Hardware.from_json(FIELDS | {'alone': slow})
  assert record.link('disk_to_host', 10, alone=True) == 0.5
  for link in ('disk_to_host', 'host_to_disk'):
    usual = record.link(link, 1000)
    alone = record.link(link, 1000, alone=link == 'host_to_disk')
    assert usual == alone == 1e-3


def test_what_a_run_has_written_may_be_read_faster():
  fast = {'disk_to_host': [[10, 1e-9]]}
  record = Hardware.from_json(FIELDS | {'fresh': fast})
  assert record.link('disk_to_host', 10, fresh=True) == 1e-9
  assert record.link('disk_to_host', 1000) == 1e-3
  assert record.link('host_to_disk', 1000, fresh=True) == 1e-3
  usual = record.link('disk_to_host', 10)
  # One by one it takes as much longer as what is not fresh, and never less.
  for times, expected in ((3, 3e-9), (0.5, 1e-9)):
    alone = {'disk_to_host': [[10, times * usual]]}
    both = Hardware.from_json(FIELDS | {'fresh': fast, 'alone': alone})
    found = both.link('disk_to_host', 10, fresh=True, alone=True)
    assert found == pytest.approx(expected)


def test_links_are_there_where_there_is_something_to_link():
  with pytest.raises(InputError, match='host_to_device'):
    Hardware.from_json(FIELDS | {'links': {}, 'disk_space': 0})
  one = Hardware.from_json(
    FIELDS | {'links': {}, 'disk_space': 0, 'unified': True, 'contention': {}}
  )
  assert one.link('host_to_device', 100) == 0
  assert Hardware.from_json(FIELDS).link('host_to_device', 0) == 0
  assert Hardware.from_json(FIELDS).link('host_to_device', 1000) == 1e-3


def test_a_dtype_of_16_bits_stands_for_the_other():
  record = Hardware.from_json(FIELDS)
  assert record.knows('float16')
  assert record.of(record.mlp, 'float16') is record.mlp['bfloat16']
  half = Hardware.from_json(FIELDS | {'mlp': {'float16': {'768': LINE}}})
  assert half.knows('bfloat16')
  # As fast as 16 bits is too fast, but better than no plan.
  assert half.of(half.mlp, 'float32') is half.mlp['float16']
  whole = Hardware.from_json(FIELDS | {'mlp': {'float32': {'768': LINE}}})
  assert not whole.knows('float16')
  with pytest.raises(InputError, match=r'a machine.*float16.*float32'):
    whole.of(whole.mlp, 'float16')


BROKEN = [
  *((name, MISSING) for name in FIELDS if name not in OPTIONAL),
  *((name, None) for name in FIELDS),
  *((name, 'nonsense') for name in FIELDS if name not in ('name', 'source')),
  ('name', 3),
  ('source', ['a']),
  ('platform', 'abacus'),
  ('unified', 1),
  ('device_memory', -1),
  ('host_memory', True),
  ('disk_space', math.inf),
  ('device_memory', math.nan),
  ('device_memory', 10**400),
  ('links', {k: LINE for k in hardware.LINKS if k != 'disk_to_host'}),
  ('links', dict.fromkeys((*hardware.LINKS, 'disk_to_device'), LINE)),
  ('links', {k: [[1, 0]] for k in hardware.LINKS}),
  ('contention', {'host_to_devise': 0.1}),
  ('contention', {'host_to_device': -0.1}),
  ('contention', {'host_to_device': 1.5}),
  ('alone', {'disk_to_device': LINE}),
  ('fresh', {'disk_to_device': LINE}),
  ('mlp', {'float32': LINE}),
  ('mlp', {'float32': {}}),
  ('mlp', {'float32': {'wide': LINE}}),
  ('mlp', {'float32': {'nan': LINE}}),
  ('mlp', {'float32': {'1': LINE, '1.0': LINE}}),
  ('prefill_attention', {'float32': {'64': []}}),
  ('decode_attention', {'float32': {'64': LINE}}),
  ('host_attention', {'float32': [[2, 1], [1, 2]]}),
  ('expand', {'4': LINE}),
  ('pack', {'8': LINE}),
  ('row_write', {'device': LINE}),
  ('pick', []),
  ('pick', [[1]]),
  ('pick', [['1', '2']]),
  ('pick', ['12', '35']),
  ('pick', [[True, 1]]),
  ('pick', [[10**400, 1]]),
  ('dispatch', {'compute': 1, 'read': 1}),
  ('dispatch', {'compute': 1, 'read': 1, 'write': '1'}),
]


@pytest.mark.parametrize(('name', 'value'), BROKEN)
def test_a_broken_field_is_refused_by_name(name, value):
  fields = copy.deepcopy(FIELDS)
  if value is MISSING:
    del fields[name]
  else:
    fields[name] = value
  with pytest.raises(InputError, match=name):
    Hardware.from_json(fields)


def test_an_unknown_field_is_refused_by_name():
  with pytest.raises(InputError, match='colour'):
    Hardware.from_json(FIELDS | {'colour': 'green'})


@pytest.mark.parametrize('text', ['', '[]', '{', '3', '\x80', '{"name": 1}'])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text):
  path = tmp_path / 'box.json'
  path.write_bytes(text.encode('latin1'))
  with pytest.raises(InputError, match=r'box\.json'):
    hardware.read(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
  for path in tmp_path / 'none.json', tmp_path:
    with pytest.raises(InputError, match=path.name):
      hardware.read(path)


def test_a_record_is_written_and_its_directory_made(tmp_path):
  path = tmp_path / 'a' / 'b' / 'box.json'
  record = Hardware.from_json(FIELDS)
  hardware.write(path, record)
  assert hardware.read(path) == record
  assert [p.name for p in path.parent.iterdir()] == ['box.json']


# The records that ship.


@pytest.fixture(scope='module')
def script():
  path = CONFIGS / 'from_data_sheet.py'
  spec = importlib.util.spec_from_file_location('from_data_sheet', path)
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module


def test_records_are_what_the_script_writes(script, tmp_path):
  script.main(tmp_path)
  made = {p.name: p.read_text() for p in tmp_path.iterdir()}
  assert made
  for name, text in made.items():
    assert (CONFIGS / name).read_text() == text, f'{name} is not up to date'


def every_curve(value):
  if isinstance(value, Curve):
    yield value
  elif isinstance(value, Family):
    yield from (curve for _, curve in value.curves)
  elif isinstance(value, dict):
    yield from itertools.chain.from_iterable(map(every_curve, value.values()))


@pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.stem)
def test_a_record_that_ships_is_sound(path):
  record = hardware.read(path)
  assert record.name
  assert record.source.strip()
  assert set(record.mlp) & {'float16', 'bfloat16'}
  for dtype in record.mlp:
    for table in record.prefill_attention, record.decode_attention:
      assert record.of(table, dtype)
  # A float16 cache that the CPU attends to is kept in float32.
  assert 'float32' in record.host_attention
  assert record.device_memory
  assert record.host_memory
  fields = vars(record).values()
  for curve in itertools.chain.from_iterable(map(every_curve, fields)):
    seconds = [y for _, y in curve.points]
    assert seconds == sorted(seconds)
  assert all(0 <= part < 1 for part in record.contention.values())


def fastest(curve):
  return max(x / y for x, y in curve.points)


def test_as_many_numbers_in_16_bits_as_in_float32_where_those_are_unknown():
  old = Hardware.from_json(FIELDS | {'host_attention': {'float32': LINE}})
  assert old.host_attend('bfloat16', 1e6) == old.host_attend('float32', 2e6)
  new = Hardware.from_json(FIELDS | {'host_attention': {'bfloat16': LINE}})
  assert new.host_attend('bfloat16', 1e6) == old.host_attend('float32', 1e6)
  none = Hardware.from_json(FIELDS | {'host_attention': {}})
  with pytest.raises(InputError, match='bfloat16'):
    none.host_attend('bfloat16', 1e6)


@pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.stem)
def test_no_estimate_is_beyond_the_data_sheet(script, path):
  if path.stem not in script.MACHINES:
    pytest.skip('measured, not from a data sheet')
  machine, record = script.MACHINES[path.stem], hardware.read(path)
  for size, curve in record.mlp[machine.dtype].curves:
    assert 16 * size**2 * fastest(curve) < machine.flops
    assert 16 * size**2 / curve(1) < machine.memory
  # Wide layers and long inputs are limited by the machine, not by launches.
  size, curve = record.mlp[machine.dtype].curves[-1]
  assert 16 * size**2 * fastest(curve) > 0.25 * machine.flops
  for head, curve in record.prefill_attention[machine.dtype].curves:
    assert 4 * head * fastest(curve) < machine.flops
  assert fastest(record.decode_attention[machine.dtype]) < machine.memory
  for bits in (4, 8):
    moved = bits / 8 + 1 / 16 + 2
    assert fastest(record.pack[str(bits)]) < fastest(record.expand[str(bits)])
    assert fastest(record.expand[str(bits)]) * moved < machine.memory
  for name in ('host_to_device', 'device_to_host'):
    assert 0.7 * machine.link < fastest(record.links[name]) < machine.link
  assert fastest(record.row_write['host']) < machine.link
  for curve in record.host_attention.values():
    assert fastest(curve) < machine.memory
  if machine.disk_space:
    read, write = machine.disk
    assert 0.9 * read < fastest(record.links['disk_to_host']) < read
    assert 0.9 * write < fastest(record.links['host_to_disk']) < write


def test_an_h200_derived_the_same_way_is_as_fast_as_measured(script):
  h200 = script.Machine(
    name='H200',
    source='its data sheet',
    platform='gpu',
    dtype='bfloat16',
    device_memory=1,
    host_memory=1,
    flops=989e12,
    memory=4.8e12,
    link=63e9,
    host_rate=16 * script.HOST,
  ).record
  experiments = CONFIGS.parent.parent / 'experiments'
  with (experiments / '03_four_bits' / 'expansion.csv').open() as f:
    rows = [row for row in csv.DictReader(f) if row['kernel'] == 'expand']
  for row in rows:
    seconds = h200.expand[row['bits']](int(row['rows']) * int(row['columns']))
    assert seconds == pytest.approx(float(row['ms']) / 1000, rel=0.2)
  with (experiments / '02_h200_first' / 'results.csv').open() as f:
    rows = [r for r in csv.DictReader(f) if r['row'] == '6.7b-device-8x1']
  # Prefill of 8 x 512 tokens: an MLP and half as much in attention's products,
  # and scores of a chunk of 256 queries end where the chunk does.
  layer = 1.5 * h200.mlp['bfloat16'](4096, 8 * 512, 2)
  scores = 8 * 32 * (256 * 256 + 256 * 512)
  layer += h200.prefill_attention['bfloat16'](128, scores, 0)
  assert rows
  for row in rows:
    assert 32 * layer == pytest.approx(float(row['prefill_s']), rel=0.1)
