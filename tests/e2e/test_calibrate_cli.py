"""flexjax calibrate: what it writes and prints, and what it refuses."""

import dataclasses
import json

import pytest

from flexjax import hardware
from flexjax.hardware import Curve, Family, Hardware
from tests.commands import refuses

CURVE = Curve(((1e6, 2e-4), (1e8, 4e-3)))
FAMILIES = {'bfloat16': Family(((64, CURVE), (128, CURVE)))}
BITS = {'4': CURVE, '8': CURVE}
RECORD = Hardware(
  name='A machine',
  source='made up',
  platform='gpu',
  unified=False,
  device_memory=2**34,
  host_memory=2**37,
  disk_space=2**40,
  links=dict.fromkeys(hardware.LINKS, CURVE),
  mlp=FAMILIES,
  prefill_attention=FAMILIES,
  decode_attention={'bfloat16': CURVE},
  host_attention={'float32': CURVE},
  expand=BITS,
  pack=BITS,
  row_write={'device': CURVE, 'host': CURVE},
  pick=Curve(((50272.0, 1e-5),)),
  dispatch={'compute': 2e-4, 'read': 6e-5, 'write': 7e-5},
  contention={'disk_to_host': 0.25},
)
ROWS = [
  'host to device',
  'disk to host',
  'mlp bfloat16 D=64',
  'prefill bfloat16 H=128',
  'decode bfloat16',
  'decode on the CPU float32',
  'expand 4 bits',
  'pack 8 bits',
  'write rows, host',
  'pick',
  'dispatch, compute',
  'lost to computing',
]


@pytest.fixture
def command(flexjax, tmp_path):
  """Runs calibrate with a record that is made up, and its own cache."""
  (tmp_path / 'made_up.json').write_text(json.dumps(RECORD.to_json()))

  def run(*argv):
    patch = f"""
import json, os
from pathlib import Path
os.environ['FLEXJAX_CACHE_DIR'] = {str(tmp_path / 'cache')!r}
folder = Path({str(tmp_path)!r})
from flexjax import hardware
from flexjax.runtime import calibrate

def measure(*, disk_dir, quick, on_progress):
  asked = dict(disk_dir=disk_dir and str(disk_dir), quick=quick)
  (folder / 'asked.json').write_text(json.dumps(asked))
  on_progress('calibrate', 1, 1)
  return hardware.read(folder / 'made_up.json')

calibrate.measure = measure
"""
    return flexjax('calibrate', *argv, patch=patch)

  return run


def test_the_record_goes_where_it_is_asked_to(command, tmp_path):
  path = tmp_path / 'record.json'
  done = command(f'--output={path}', '--disk_dir=/nvme')
  assert done.code == 0, done.stderr
  assert hardware.read(path).to_json() == RECORD.to_json()
  assert done.stdout.endswith(f'{path}\n')
  assert not (tmp_path / 'cache').exists()
  asked = json.loads((tmp_path / 'asked.json').read_text())
  assert asked == {'disk_dir': '/nvme', 'quick': False}


def test_without_output_it_goes_to_the_cache(command, tmp_path):
  done = command('--quick')
  assert done.code == 0, done.stderr
  (path,) = (tmp_path / 'cache').iterdir()
  assert hardware.read(path).name == RECORD.name
  assert done.stdout.endswith(f'{path}\n')
  asked = json.loads((tmp_path / 'asked.json').read_text())
  assert asked == {'disk_dir': None, 'quick': True}


def test_the_table_names_what_was_measured(command, tmp_path):
  done = command(f'--output={tmp_path}/record.json')
  for row in [RECORD.name, RECORD.source, *ROWS]:
    assert row in done.stdout, row
  for figure in ('25 GB/s', '1.64 PFLOP/s', '95.37 MiB', '10 us', '25 %'):
    assert figure in done.stdout, figure
  assert done.stderr == ''


def test_one_point_makes_a_row(command, tmp_path):
  links = dict.fromkeys(hardware.LINKS, Curve(((2**20, 2e-4),)))
  one = dataclasses.replace(RECORD, links=links)
  (tmp_path / 'made_up.json').write_text(json.dumps(one.to_json()))
  done = command(f'--output={tmp_path}/record.json')
  assert done.code == 0, done.stderr
  assert '5.24 GB/s' in done.stdout


@pytest.mark.parametrize(
  ('argv', 'expected'),
  [
    (['--output={}'], r'cannot be written'),
    (['--output={}/new/record.json'], r'cannot be written'),
    (['--output={}/made_up.json/record.json'], r'made_up\.json'),
    (['--quick=maybe'], r'quick'),
    (['--model=opt-1.3b'], r'model'),
    (['everything'], r'everything'),
  ],
  ids=[
    'a directory',
    'no directory',
    'below a file',
    'no bool',
    'no such flag',
    'no flag',
  ],
)
def test_bad_input_is_refused(argv, expected, command, tmp_path):
  done = command(*(a.replace('{}', str(tmp_path)) for a in argv))
  refuses(done, expected)
  assert not (tmp_path / 'asked.json').exists()


def test_a_disk_that_cannot_be_written_is_refused(flexjax, tmp_path):
  (tmp_path / 'file').write_text('')
  argv = [f'--disk_dir={tmp_path}/file', f'--output={tmp_path}/record.json']
  refuses(flexjax('calibrate', '--quick', *argv), r'disk_dir.*file')
  assert not (tmp_path / 'record.json').exists()
