"""Folders of weights in fewer bits, by convert and generate."""

import functools
import json
import re
import shutil

import pytest
from conftest import make_checkpoint, save_tokenizer
from safetensors.torch import load_file, save_file

from flexjax import load
from flexjax.errors import InputError, UnusableWeights
from tests.commands import (
  edit,
  has_weights,
  refuses,
  snapshot,
  start,
  wait_for,
  weights_in,
)

FAST = """
import jax
from flexjax.runtime import formats
formats._CHUNK_ELEMENTS = 2**14
jax.config.update('jax_compilation_cache_dir', {!r})
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
"""


@pytest.fixture(scope='session')
def fast(flexjax, tmp_path_factory):
  """Like `flexjax`, but what it compiles is kept, and chunks are small.

  Matrices are packed in chunks of one size: small ones would be all padding.
  """
  patch = FAST.format(str(tmp_path_factory.mktemp('compiled')))
  return functools.partial(flexjax, patch=patch)


@pytest.fixture(scope='session')
def small(fast, tmp_path_factory):
  """A checkpoint, its tokens in 4 bits, and a folder that holds these bits."""
  root = tmp_path_factory.mktemp('small')
  model = root / 'model'
  make_checkpoint(model, hidden_size=128, ffn_dim=256, num_attention_heads=2)
  save_tokenizer(model)
  (root / 'in.jsonl').write_text('{"prompt": "ab"}\n{"prompt": [5, 6, 7]}\n')
  tokens = generated(fast, root, f'--model={model}', '--weight_bits=4')
  assert tokens != generated(fast, root, f'--model={model}')
  convert = ['convert', f'--model={model}', '--dtype=float32']
  done = fast(*convert, '--weight_bits=4', f'--disk_dir={root}/packed')
  assert done.code == 0, done.stderr
  return root, tokens


def generated(flexjax, root, *argv):
  """Tokens of two prompts."""
  done = flexjax(
    'generate',
    f'--input={root}/in.jsonl',
    '--dtype=float32',
    '--max_new_tokens=6',
    *argv,
  )
  assert done.code == 0, done.stderr
  return [json.loads(line)['token_ids'] for line in done.stdout.splitlines()]


def matrix_bytes(folder):
  names = {'qkv', 'out', 'fc1', 'fc2'}
  return sum(
    p.stat().st_size
    for p in folder.rglob('*')
    if p.is_file() and names & set(p.parts) and p.name != 'zarr.json'
  )


def test_manifest_of_packed_weights(small):
  root, _ = small
  manifest = json.loads((root / 'packed' / 'flexjax.json').read_text())
  form = manifest['format']
  assert form['weight_bits'] == 4
  assert form['group_size'] == 64
  assert form['axis'] == 'in'
  assert form['rounding'] == 'search'
  assert form['dtype'] == 'float32'
  assert manifest['complete'] == list(range(7))
  numbers = 2 * (4 * 128 * 128 + 2 * 256 * 128)
  assert matrix_bytes(root / 'packed') <= 0.285 * 2 * numbers


WITHOUT = {
  'device': [],
  'host': ['--weights=0,100,0'],
  'disk': ['--weights=0,0,100'],
  'disk, disk_dir': [
    '--disk_dir={}/disk',
    '--weights=0,40,60',
    '--cache=0,0,100',
    '--weight_bits=4',
  ],
}


@pytest.mark.parametrize('argv', WITHOUT.values(), ids=WITHOUT)
def test_packed_folder_needs_no_checkpoint(fast, small, tmp_path, argv):
  root, tokens = small
  # Elsewhere, so that nothing of the checkpoint can be found.
  shutil.copytree(root / 'packed', tmp_path / 'packed')
  shutil.copy(root / 'in.jsonl', tmp_path)
  argv = [f'--model={tmp_path}/packed', *argv]
  argv = [a.replace('{}', str(tmp_path)) for a in argv]
  before = snapshot(tmp_path / 'packed')
  assert generated(fast, tmp_path, *argv) == tokens
  assert snapshot(tmp_path / 'packed') == before


def test_second_conversion_writes_nothing(flexjax, small):
  root, _ = small
  packed = root / 'packed'

  def times():
    return {p: p.stat().st_mtime_ns for p in packed.rglob('*') if p.is_file()}

  before = times()
  argv = ['convert', f'--model={root}/model', f'--disk_dir={packed}']
  argv += ['--dtype=float32', '--weight_bits=4']
  assert flexjax(*argv).code == 0
  assert times() == before


OTHERWISE = {
  'weight_bits 8': ['--weight_bits=8'],
  'weight_bits 16': ['--weight_bits=16'],
  'dtype': ['--dtype=bfloat16'],
  'group_size': ['--group_size=32'],
  'rounding': ['--rounding=minmax'],
}


@pytest.mark.parametrize('flags', OTHERWISE.values(), ids=OTHERWISE)
def test_packed_folder_is_what_it_is(flexjax, small, tmp_path, flags):
  root, _ = small
  before = snapshot(root)
  model = f'--model={root}/packed'
  argv = ['generate', model, '--prompt=ab', *flags]
  refuses(flexjax(*argv), r'/packed')
  refuses(flexjax(*argv, f'--disk_dir={tmp_path}/disk'), r'/packed')
  argv = ['convert', model, f'--disk_dir={tmp_path}/disk', *flags]
  refuses(flexjax(*argv), r'/packed')
  assert snapshot(root) == before
  assert not list(tmp_path.iterdir())


def test_checkpoint_beside_a_packed_folder(flexjax, small):
  """The checkpoint may be asked for other bits, but not into this folder."""
  root, _ = small
  before = snapshot(root)
  argv = [f'--model={root}/model', '--dtype=float32', '--weight_bits=8']
  argv += [f'--disk_dir={root}/packed']
  refuses(flexjax('convert', *argv), r'weight_bits.*4.*8')
  argv += ['--prompt=ab', '--weights=0,0,100']
  refuses(flexjax('generate', *argv), r'weight_bits.*4.*8')
  assert snapshot(root) == before


def test_packed_folder_keeps_the_waves(fast, small, tmp_path):
  """With a packed cache too, folder and checkpoint give the same tokens."""
  root, _ = small
  bits = ['--weight_bits=4', '--cache_bits=4']
  tokens = generated(fast, root, f'--model={root}/model', *bits)
  folder = [f'--model={root}/packed', *bits]
  assert generated(fast, root, *folder) == tokens
  disk = [f'--disk_dir={tmp_path}/disk', '--weights=0,0,100']
  assert generated(fast, root, *folder, *disk) == tokens
  # Weights that a run has put on disk are a folder like a converted one.
  model = [f'--model={root}/model', f'--disk_dir={tmp_path}/run']
  assert generated(fast, root, *model, *bits, '--weights=0,0,100') == tokens
  left = f'--model={tmp_path}/run'
  assert generated(fast, root, left, '--cache_bits=4') == tokens


def damage(name, change):
  def damaged(path):
    (path / name).write_bytes(change((path / name).read_bytes()))

  return damaged


def rewrite(**fields):
  def change(content):
    manifest = json.loads(content)
    manifest['format'] |= fields
    return json.dumps(manifest).encode()

  return damage('flexjax.json', change)


DAMAGED = {
  'waves cut': (damage('waves.npy', lambda x: x[:-9]), 'waves.npy.*damaged'),
  'waves junk': (damage('waves.npy', lambda x: b'x'), 'waves.npy.*damaged'),
  'waves NaN': (
    damage('waves.npy', lambda x: x[:-4] + b'\0\0\xc0\x7f'),
    'waves.npy.*damaged',
  ),
  'no waves': (lambda path: (path / 'waves.npy').unlink(), 'waves.npy'),
  'dtype': (rewrite(dtype='foo'), "flexjax.json.*'foo'"),
  'bits': (rewrite(weight_bits=5), 'flexjax.json.*weight_bits.*5'),
  'rounding': (rewrite(rounding='x'), "flexjax.json.*rounding.*'x'"),
}


@pytest.mark.parametrize('case', DAMAGED.values(), ids=DAMAGED)
def test_damaged_packed_folder(flexjax, small, tmp_path, case):
  harm, message = case
  root, _ = small
  shutil.copytree(root / 'packed', tmp_path / 'packed')
  harm(tmp_path / 'packed')
  argv = [f'--model={tmp_path}/packed', '--prompt=ab', '--cache_bits=4']
  refuses(flexjax('generate', *argv), message)


def test_refused_packing_leaves_nothing(flexjax, small, tmp_path):
  root, _ = small
  shutil.copytree(root / 'model', tmp_path / 'model')
  weights = load_file(tmp_path / 'model' / 'model.safetensors')
  weights['model.decoder.layers.0.fc1.weight'][3, 5] = float('nan')
  save_file(weights, tmp_path / 'model' / 'model.safetensors')
  argv = ['convert', '--weight_bits=4', f'--disk_dir={tmp_path}/disk']
  refuses(flexjax(*argv, f'--model={tmp_path}/model'), r'layers\.0\.fc1')
  assert not list((tmp_path / 'disk').iterdir())


def test_unfinished_packed_folder(flexjax, small, tmp_path):
  root, _ = small
  shutil.copytree(root / 'packed', tmp_path / 'packed')
  edit('packed/flexjax.json', complete=[0, 1, 2, 4])(tmp_path)
  before = snapshot(tmp_path)
  model = f'--model={tmp_path}/packed'
  refuses(flexjax('generate', model, '--prompt=ab'), r'/packed.*\b3 of 7\b')
  argv = ['convert', model, f'--disk_dir={tmp_path}/disk']
  refuses(flexjax(*argv), r'/packed.*\b3 of 7\b')
  assert snapshot(tmp_path) == before


def test_killed_packing_is_resumed(fast, tmp_path):
  model = tmp_path / 'model'
  make_checkpoint(model, num_hidden_layers=16, hidden_size=64, ffn_dim=128)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  argv = ['convert', f'--model={model}', '--weight_bits=4', '--dtype=bfloat16']
  done = fast(*argv, f'--disk_dir={whole}')
  assert done.code == 0, done.stderr
  manifest = killed / 'flexjax.json'
  with start(*argv, f'--disk_dir={killed}') as process:
    wait_for(process, lambda: has_weights(manifest))
    process.kill()
  held = json.loads(manifest.read_text())['complete']
  total = len(json.loads((whole / 'flexjax.json').read_text())['complete'])
  assert 0 < len(held) < total
  done = fast(*argv, f'--disk_dir={killed}')
  assert done.code == 0, done.stderr
  assert weights_in(killed) == weights_in(whole)


PREFIX = 'model.decoder.'
SPOILT = {
  'matrix': ('layers.1.fc2.weight', float('nan')),
  'part of a matrix': ('layers.0.self_attn.k_proj.weight', float('inf')),
  'bias': ('layers.1.self_attn.v_proj.bias', float('nan')),
  'norm': ('layers.0.final_layer_norm.weight', float('-inf')),
  'table': ('embed_tokens.weight', float('-inf')),
  'positions': ('embed_positions.weight', float('nan')),
}


def spoil(file, name, number):
  """Puts a number in the middle of a checkpoint's tensor."""
  tensors = load_file(file)
  tensor = tensors[PREFIX + name]
  tensor.view(-1)[tensor.numel() // 2 + 1] = number
  save_file(tensors, file, {'format': 'pt'})


NOT_FINITE = [
  *((name, 16) for name in SPOILT),
  ('matrix', 4),
  ('bias', 4),
  ('table', 4),
]


@pytest.mark.parametrize(('case', 'bits'), NOT_FINITE)
def test_numbers_that_are_not_finite(fast, place, case, bits):
  """In the middle of a tensor; the line names it; nothing counts as there."""
  name, number = SPOILT[case]
  spoil(place / 'one' / 'model.safetensors', name, number)
  argv = [f'--model={place}/one', f'--weight_bits={bits}', '--dtype=bfloat16']
  disk = f'--disk_dir={place}/disk'
  expected = re.escape(name)
  refuses(fast('convert', *argv, disk), expected)
  refuses(fast('generate', f'--model={place}/disk', '--prompt=ab'), r'/disk')
  argv += [f'--input={place}/in.jsonl', f'--output={place}/out.jsonl']
  argv += ['--weights=50,50,0']
  refuses(fast('generate', *argv), expected)
  assert not (place / 'out.jsonl').exists()


BITS = {
  'weight_bits': ('--weight_bits=5', r'weight_bits.*\b5\b'),
  'weight_bits 0': ('--weight_bits=0', r'weight_bits.*\b0\b'),
  'weight_bits is no number': ('--weight_bits=x', r'weight_bits'),
  'cache_bits': ('--cache_bits=3', r'cache_bits.*\b3\b'),
  'cache_bits 0': ('--cache_bits=0', r'cache_bits.*\b0\b'),
  'group_size': ('--group_size=48', r'group_size.*\b48\b'),
  'group_size 0': ('--group_size=0', r'group_size.*\b0\b'),
  'rounding': ('--rounding=x', r'rounding.*\bx\b'),
  'empty rounding': ('--rounding=', r'rounding'),
}


@pytest.mark.parametrize('case', BITS.values(), ids=BITS)
def test_bits_refused(flexjax, place, case):
  flag, expected = case
  before = snapshot(place)
  argv = [f'--model={place}/one', f'--disk_dir={place}/disk', flag]
  out = [f'--output={place}/out.jsonl', f'--stats={place}/stats.json']
  done = flexjax('generate', f'--input={place}/in.jsonl', *out, *argv)
  refuses(done, expected)
  refuses(flexjax('bench', *argv), expected)
  # The cache is no part of a conversion: an unknown flag, then.
  refuses(flexjax('convert', *argv), expected.split('.*')[0])
  assert snapshot(place) == before


def test_cache_bits_and_attention_on_host(flexjax, place):
  argv = ['generate', f'--model={place}/one', f'--input={place}/in.jsonl']
  argv += ['--attention=host', '--cache_bits=4']
  refuses(flexjax(*argv), r'attention.*cache_bits')


@pytest.mark.parametrize('bits', [16, 4])
@pytest.mark.parametrize('command', ['convert', 'generate'])
def test_mended_checkpoint_finds_an_empty_folder(fast, place, command, bits):
  """Where groups of a damaged one were complete before that was seen."""
  file = place / 'one' / 'model.safetensors'
  whole = file.read_bytes()
  argv = [command, f'--model={place}/one', f'--weight_bits={bits}']
  argv += ['--dtype=bfloat16', '--rounding=minmax', f'--disk_dir={place}/disk']
  if command == 'generate':
    argv += ['--prompt=ab', '--weights=0,40,60', '--cache=100,0,0']
  spoil(file, *SPOILT['matrix'])
  (place / 'disk' / 'weights.1').mkdir(parents=True)
  mine = place / 'disk' / 'weights.1' / 'mine.txt'
  mine.write_text('mine')
  refuses(fast(*argv), re.escape(PREFIX + SPOILT['matrix'][0]))
  left = [p for p in (place / 'disk').rglob('*') if p.is_file()]
  assert left == [mine]
  file.write_bytes(whole)
  done = fast(*argv)
  assert done.code == 0, done.stderr
  assert list((place / 'disk').glob('weights.*'))


def test_another_dtype_after_one_that_is_too_small(fast, place):
  spoil(place / 'one' / 'model.safetensors', SPOILT['matrix'][0], 1e6)
  argv = ['convert', f'--model={place}/one', f'--disk_dir={place}/disk']
  refuses(fast(*argv, '--dtype=float16'), 'too large for float16; use bfloat16')
  done = fast(*argv, '--dtype=bfloat16')
  assert done.code == 0, done.stderr


def test_damaged_checkpoint_leaves_others_weights(fast, place):
  """What the folder holds is not of the one that is refused."""
  argv = ['--dtype=float32', f'--disk_dir={place}/disk']
  assert fast('convert', f'--model={place}/one', *argv).code == 0
  before = snapshot(place / 'disk')
  spoil(place / 'one' / 'model.safetensors', *SPOILT['matrix'])
  refuses(fast('convert', f'--model={place}/one', *argv), 'another model')
  assert snapshot(place / 'disk') == before


def test_refused_again_and_mended_while_it_is_open(place):
  """Each use says what is wrong with the files; none keeps what is read now
  under the name of what was there."""
  file = place / 'one' / 'model.safetensors'
  whole = file.read_bytes()
  spoil(file, *SPOILT['matrix'])
  options = {'disk_dir': place / 'disk', 'weights': (0, 0, 100)}
  options |= {'weight_bits': 4, 'rounding': 'minmax', 'dtype': 'bfloat16'}
  with load(place / 'one', **options) as llm:
    for _ in range(2):
      with pytest.raises(UnusableWeights, match='not finite'):
        llm.score([[5, 6, 7]])
    file.write_bytes(whole)
    with pytest.raises(InputError, match='has changed since it was opened'):
      llm.score([[5, 6, 7]])
  with load(place / 'one', **options) as llm:
    llm.score([[5, 6, 7]])
