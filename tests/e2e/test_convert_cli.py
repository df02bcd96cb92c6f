"""flexjax convert, and the folders it writes."""

import json
import shutil

import pytest
from conftest import make_checkpoint, save_tokenizer

from tests.commands import (
  SMALL_DISK,
  edit,
  has_weights,
  refuses,
  snapshot,
  start,
  wait_for,
  weights_in,
)


def test_convert_to_too_small_a_disk(flexjax, place):
  before = snapshot(place)
  argv = ['convert', f'--model={place}/one', f'--disk_dir={place}/disk']
  refuses(flexjax(*argv, patch=SMALL_DISK), r'4\.00 KiB')
  assert snapshot(place) == before


def test_disk_tier_of_another_model_or_dtype(flexjax, place):
  convert = ['convert', f'--disk_dir={place}/disk', '--dtype=float32']
  done = flexjax(*convert, f'--model={place}/one')
  assert done.code == 0, done.stderr
  before = snapshot(place)
  generate = [
    'generate',
    f'--input={place}/in.jsonl',
    f'--output={place}/out.jsonl',
    f'--disk_dir={place}/disk',
    '--weights=0,0,100',
  ]
  other = [f'--model={place}/other', '--dtype=float32']
  refuses(flexjax(*generate, *other), r'/disk.*another model')
  refuses(flexjax(*convert, f'--model={place}/other'), r'/disk.*another')
  half = [f'--model={place}/one', '--dtype=bfloat16']
  refuses(flexjax(*generate, *half), r'/disk.*float32.*bfloat16')
  manifest = place / 'disk' / 'flexjax.json'
  text = manifest.read_text()
  own = [f'--model={place}/one', '--dtype=float32']
  for damaged in ('', '{', '[]', text.replace('"format": ', '"format": 9')):
    manifest.write_text(damaged)
    refuses(flexjax(*generate, *own), r'flexjax\.json|version|format')
  manifest.write_text(text)
  assert snapshot(place) == before
  assert flexjax(*generate, *own).code == 0


def test_killed_conversion(flexjax, tmp_path):
  """It is recognised, resumed, and never taken for complete."""
  model = tmp_path / 'model'
  make_checkpoint(model, num_hidden_layers=16, hidden_size=64, ffn_dim=256)
  save_tokenizer(model)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  argv = ['convert', f'--model={model}', '--dtype=float32', '--disk_dir={}']

  def command(disk):
    return [a.replace('{}', str(disk)) for a in argv]

  done = flexjax(*command(whole))
  assert done.code == 0, done.stderr
  manifest = killed / 'flexjax.json'
  total = len(json.loads((whole / 'flexjax.json').read_text())['complete'])
  with start(*command(killed)) as process:
    wait_for(process, lambda: has_weights(manifest))
    process.kill()
  held = json.loads(manifest.read_text())['complete']
  assert 0 < len(held) < total
  # What is listed is whole; what is not may be anything.
  for group in held:
    for path in (whole / f'weights.{group}').rglob('*'):
      if path.is_file():
        twin = killed / path.relative_to(whole)
        assert twin.read_bytes() == path.read_bytes()
  torn = killed / f'weights.{max(set(range(total)) - set(held))}'
  shutil.rmtree(torn, ignore_errors=True)
  shutil.copytree(whole / torn.name, torn)
  for path in torn.glob('*/c/**/*'):
    if path.is_file():
      path.write_bytes(bytes(path.stat().st_size))
  # A run completes the folder by itself, and so does convert.
  again = tmp_path / 'again'
  shutil.copytree(killed, again)
  prompts = tmp_path / 'in.jsonl'
  prompts.write_text('{"prompt": [5, 6, 7, 8], "ignore_eos": true}\n')
  generate = [
    'generate',
    f'--model={model}',
    f'--input={prompts}',
    '--dtype=float32',
    '--max_new_tokens=4',
  ]
  texts = [
    flexjax(*generate, f'--disk_dir={disk}', '--weights=0,0,100').stdout
    for disk in (whole, again)
  ]
  texts.append(flexjax(*generate).stdout)
  assert json.loads(texts[0])['token_ids']
  assert texts[0] == texts[1] == texts[2]
  done = flexjax(*command(killed))
  assert done.code == 0, done.stderr
  assert weights_in(killed) == weights_in(whole)
  assert weights_in(again) == weights_in(whole)
  times = {p: p.stat().st_mtime_ns for p in killed.rglob('*') if p.is_file()}
  assert flexjax(*command(killed)).code == 0
  assert times == {
    p: p.stat().st_mtime_ns for p in killed.rglob('*') if p.is_file()
  }


# Before a file takes the place of NAME for the COUNTth time.
KILLED = """
import os, pathlib
replace, counted = pathlib.Path.replace, []

def die(self, target):
  counted.extend([target] if pathlib.Path(target).name == '{}' else [])
  if len(counted) == {}:
    os._exit(9)
  return replace(self, target)

pathlib.Path.replace = die
"""


@pytest.mark.parametrize(
  ('name', 'count', 'bits'),
  [
    ('vocab.json', 1, 16),
    ('flexjax.json', 1, 16),
    ('flexjax.json', 4, 16),
    ('waves.npy', 1, 4),
  ],
)
def test_killed_at_a_file_that_is_replaced(flexjax, place, name, count, bits):
  """Nothing of it is left beside what the next conversion writes."""
  argv = ['convert', f'--model={place}/one', f'--weight_bits={bits}']
  assert flexjax(*argv, f'--disk_dir={place}/whole').code == 0
  argv += [f'--disk_dir={place}/killed']
  assert flexjax(*argv, patch=KILLED.format(name, count)).code == 9
  left = [p.name for p in (place / 'killed').iterdir()]
  assert any(n.endswith('.new') for n in left), left
  assert flexjax(*argv).code == 0
  assert weights_in(place / 'killed') == weights_in(place / 'whole')


def test_killed_before_the_first_group(flexjax, place, tmp_path):
  """Nothing of it is in the way of another model, or stays with that."""
  make_checkpoint(tmp_path / 'wide', hidden_size=64)
  disk = f'--disk_dir={place}/disk'
  # Before the manifest lists a group, and after it names the tokenizer.
  argv = ['convert', f'--model={place}/one', disk]
  assert flexjax(*argv, patch=KILLED.format('flexjax.json', 2)).code == 9
  left = [path.name for path in (place / 'disk').iterdir()]
  assert {'vocab.json', 'weights.0'} < set(left)
  done = flexjax('convert', f'--model={place}/wide', disk, '--dtype=float32')
  assert done.code == 0, done.stderr
  whole = ['--dtype=float32', f'--disk_dir={place}/whole']
  assert flexjax('convert', f'--model={place}/wide', *whole).code == 0
  assert weights_in(place / 'disk') == weights_in(place / 'whole')


def test_a_manifest_names_no_others_files(flexjax, place):
  """Those of a model that did not come are deleted, by known names alone."""
  argv = ['convert', f'--disk_dir={place}/disk']
  assert flexjax(*argv, f'--model={place}/one').code == 0
  (place / 'mine.txt').write_text('mine')
  names = ['../mine.txt', f'{place}/mine.txt', 'config.json', 'vocab.json']
  edit('disk/flexjax.json', model='x', complete=[], tokenizer=names)(place)
  (place / 'disk' / 'config.json').write_text('{}')
  for name in ('vocab.json', 'merges.txt'):
    (place / 'one' / name).unlink(missing_ok=True)
  assert flexjax(*argv, f'--model={place}/one').code == 0
  assert (place / 'mine.txt').exists()
  assert (place / 'disk' / 'config.json').exists()
  assert not (place / 'disk' / 'vocab.json').exists()


# What TensorStore says where a disk is full.
FULL = """
import flexjax.tiers.disk as disk

class Full:
  def __init__(self, array):
    self.array = array
  def __getattr__(self, name):
    return getattr(self.array, name)
  def __getitem__(self, part):
    return self
  def write(self, rows):
    return self
  def result(self):
    raise ValueError('No space left on device [tensorstore_spec={}]')

allocate = disk.DiskTier.allocate

def allocated(self, key, spec):
  allocate(self, key, spec)
  if key == ('weights', 2):
    self._arrays[key] = {n: Full(a) for n, a in self._arrays[key].items()}

disk.DiskTier.allocate = allocated
"""


def test_disk_that_is_full(flexjax, place):
  argv = ['convert', f'--model={place}/one', f'--disk_dir={place}/disk']
  done = flexjax(*argv, patch=FULL)
  refuses(
    done, r"/disk': weights\.2 cannot be written: No space left on device$"
  )
  assert flexjax(*argv).code == 0
  assert flexjax(*argv[:-1], f'--disk_dir={place}/whole').code == 0
  assert weights_in(place / 'disk') == weights_in(place / 'whole')


def test_file_in_the_way(flexjax, place):
  (place / 'disk').mkdir()
  (place / 'disk' / 'weights.1').write_text('mine')
  argv = ['convert', f'--model={place}/one', f'--disk_dir={place}/disk']
  refuses(flexjax(*argv), r"/disk': weights\.1 cannot be written")
  assert (place / 'disk' / 'weights.1').read_text() == 'mine'


def test_lost_chunk_is_not_read_as_zeros(flexjax, place):
  argv = [f'--model={place}/one', f'--disk_dir={place}/disk', '--dtype=float32']
  assert flexjax('convert', *argv).code == 0
  chunks = sorted((place / 'disk').glob('weights.2/*/c/**/*'))
  next(p for p in chunks if p.is_file()).unlink()
  out = place / 'out.jsonl'
  done = flexjax(
    'generate',
    f'--input={place}/in.jsonl',
    f'--output={out}',
    '--weights=0,0,100',
    *argv,
  )
  refuses(
    done, r"disk.*weights\.2 cannot be read.*; delete '.*/disk' and write"
  )
  assert 'tensorstore_spec' not in done.stderr
  assert not out.exists()
  assert not list((place / 'disk').glob('run-*'))
