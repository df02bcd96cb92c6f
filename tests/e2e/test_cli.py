"""The command line: what it writes, and what it refuses and how."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import logits_of, make_checkpoint, save_tokenizer
from safetensors.torch import load_file, save_file

from flexjax.runtime.sources import BUNDLED

HERE = Path(__file__).parent
ENVIRONMENT = {
  **os.environ,
  'JAX_PLATFORMS': 'cpu',
  'HF_HUB_OFFLINE': '1',
  'PYTHONWARNINGS': 'ignore',
}
STATS = {
  'prefill_seconds': None,
  'decode_seconds': None,
  'generated_tokens': None,
  'throughput_tokens_per_s': None,
  'decode_tokens_per_s': None,
  'peak_bytes': {'device', 'host', 'disk'},
  'link_bytes': {
    'disk_to_host',
    'host_to_device',
    'device_to_host',
    'host_to_disk',
  },
  'link_busy_fraction': None,
  'placement': {'weights', 'cache', 'hidden'},
  'stored': {'dtype', 'weight_bits', 'cache_bits'},
  'compilations': None,
  'load_seconds': None,
  'predicted': {
    'prefill_seconds',
    'decode_seconds',
    'throughput_tokens_per_s',
    'busy',
    'binding',
    'peak_bytes',
    'link_bytes',
    'planned_bytes',
  },
}
FIELDS = ['index', 'prompt', 'text', 'token_ids', 'finish_reason']


@dataclasses.dataclass(frozen=True)
class Done:
  """A command that has ended."""

  code: int
  stdout: str
  stderr: str


@pytest.fixture(scope='session')
def flexjax(tmp_path_factory):
  """Returns a function that runs `flexjax ARGUMENTS` in a fork."""
  folder = tmp_path_factory.mktemp('printed')
  with subprocess.Popen(
    [sys.executable, HERE / 'forks.py'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=ENVIRONMENT,
    text=True,
  ) as server:

    def run(*argv, patch='') -> Done:
      job = {'argv': list(map(str, argv)), 'folder': str(folder)}
      print(json.dumps(job | {'patch': patch}), file=server.stdin, flush=True)
      code = int(server.stdout.readline())
      texts = [(folder / n).read_text() for n in ('stdout', 'stderr')]
      return Done(code, *texts)

    yield run
    server.stdin.close()


@pytest.fixture(scope='session')
def models(tmp_path_factory):
  """A folder with checkpoints `one`, `other` and `shards`."""
  root = tmp_path_factory.mktemp('models')
  for seed, name in enumerate(('one', 'other', 'shards')):
    model = make_checkpoint(root / name, seed=seed)
    if name == 'shards':
      (root / name / 'model.safetensors').unlink()
      model.save_pretrained(root / name, max_shard_size='20KB')
    save_tokenizer(root / name)
  return root


@pytest.fixture
def place(models, tmp_path):
  """A folder with checkpoints and a file of two prompts."""
  shutil.copytree(models, tmp_path, dirs_exist_ok=True)
  (tmp_path / 'in.jsonl').write_text('{"prompt": "ab"}\n{"prompt": [5]}\n')
  return tmp_path


def snapshot(folder):
  return {
    path.relative_to(folder): path.is_file() and path.read_bytes()
    for path in folder.rglob('*')
  }


def refuses(done, expected):
  """Asserts that bad input gave exit code 2 and one clear line."""
  assert 'Traceback' not in done.stderr, done.stderr
  assert re.fullmatch(r'flexjax: [^\n]+\n', done.stderr), done.stderr
  assert re.search(expected, done.stderr), done.stderr
  assert done.code == 2
  assert done.stdout == ''


def lines(path):
  text = path.read_text(encoding='utf-8')
  assert text.endswith('\n')
  return [json.loads(line) for line in text[:-1].split('\n')]


def edit(file, **changes):
  def change(folder):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def write(file, content):
  def change(folder):
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      path.write_text(content)

  return change


def shard(action):
  def change(folder):
    file = sorted((folder / 'shards').glob('*00002*.safetensors'))[0]
    data = file.read_bytes()
    file.unlink()
    if action == 'truncate':
      file.write_bytes(data[:-10])

  return change


def jsonl(*prompts):
  return write('in.jsonl', ''.join(line + '\n' for line in prompts))


SMALL_DISK = """
import shutil
whole = shutil.disk_usage('/')
shutil.disk_usage = lambda path: whole._replace(free=4096)
"""
NO_WEIGHTS = """
from flexjax.runtime.loaded import LoadedModel
LoadedModel._fill = None
"""
# name: (what is changed, flags, what the line says, patch)
REFUSED = {
  'no such model': (None, ['--model={}/none'], r'/none'),
  'hub id offline': (None, ['--model=nobody/opt-none'], r'nobody/opt-none'),
  'model is a file': (None, ['--model={}/in.jsonl'], r'in\.jsonl'),
  'no config': (
    lambda d: (d / 'one/config.json').unlink(),
    [],
    r'config\.json',
  ),
  'no weights': (
    lambda d: (d / 'one/model.safetensors').unlink(),
    [],
    r'weights',
  ),
  'missing shard': (shard('delete'), ['--model={}/shards'], r'00002-of'),
  'truncated shard': (shard('truncate'), ['--model={}/shards'], r'00002-of'),
  'wrong shape': (
    edit('one/config.json', ffn_dim=48),
    [],
    r'fc1.*\b64\b.*\b48\b|fc1.*\b48\b.*\b64\b',
  ),
  'wrong number of layers': (
    edit('one/config.json', num_hidden_layers=3),
    [],
    r'layers\.2',
  ),
  'unknown config field': (
    edit('one/config.json', rotary_pct=0.5),
    [],
    r'rotary_pct',
  ),
  'unsupported value': (
    edit('one/config.json', activation_function='mish'),
    [],
    r'activation_function.*mish',
  ),
  'other architecture': (
    edit('one/config.json', model_type='llama'),
    [],
    r'model_type.*llama',
  ),
  'config is not JSON': (write('one/config.json', '{'), [], r'config\.json'),
  'no input file': (None, ['--input={}/none.txt'], r'none\.txt'),
  'input is a directory': (None, ['--input={}/one'], r'/one'),
  'empty input': (write('in.jsonl', ''), [], r'in\.jsonl.*no prompts'),
  'blank input': (
    write('in.txt', '\n  \n'),
    ['--input={}/in.txt'],
    r'in\.txt.*no prompts',
  ),
  'input is not UTF-8': (
    write('in.txt', b'ab\xff\xfe'),
    ['--input={}/in.txt'],
    r'in\.txt',
  ),
  'malformed line': (
    jsonl('{"prompt": "a"}', '', '{"prompt": '),
    [],
    r'in\.jsonl:3\b|line 3',
  ),
  'line nested too deep': (
    jsonl('{"prompt": "a"}', '[' * 200_000),
    [],
    r'in\.jsonl:2\b|line 2',
  ),
  'line is no object': (jsonl('"a"'), [], r'in\.jsonl:1\b|line 1'),
  'line without prompt': (
    jsonl('{"prompt": "a"}', '{"seed": 1}'),
    [],
    r'(in\.jsonl:2\b|line 2).*prompt',
  ),
  'unknown field in a line': (
    jsonl('{"prompt": "a"}', '{"prompt": "a", "temprature": 1}'),
    [],
    r'(in\.jsonl:2\b|line 2).*temprature',
  ),
  'bad value in a line': (
    jsonl('{"prompt": "a", "temperature": NaN}'),
    [],
    r'(in\.jsonl:1\b|line 1).*temperature',
  ),
  'bad type in a line': (
    jsonl('{"prompt": "a", "max_new_tokens": "3"}'),
    [],
    r'(in\.jsonl:1\b|line 1).*max_new_tokens',
  ),
  'prompt of no kind': (
    jsonl('{"prompt": [1.5]}'),
    [],
    r'(in\.jsonl:1\b|line 1).*prompt',
  ),
  'prompt without ids': (jsonl('{"prompt": []}'), [], r'empty'),
  'id out of the vocabulary': (jsonl('{"prompt": [120]}'), [], r'120'),
  'lone surrogate': (jsonl(r'{"prompt": "a\ud800"}'), [], r'surrogate'),
  'prompt and input': (None, ['--prompt=a'], r'--prompt.*--input'),
  'prompt too long': (
    jsonl(json.dumps({'prompt': [5] * 36})),
    ['--max_new_tokens=5'],
    r'\b36\b.*\b40\b.*\b35\b',
  ),
  'max_new_tokens beyond the context': (
    None,
    ['--max_new_tokens=40'],
    r'max_new_tokens.*40',
  ),
  'sum below 100': (None, ['--weights=50,20,20'], r'weights.*100.*\b90\b'),
  'sum above 100': (None, ['--cache=50,50,20'], r'cache.*100.*\b120\b'),
  'two percentages': (None, ['--hidden=50,50'], r'hidden.*50,50'),
  'negative percentage': (None, ['--weights=150,-50,0'], r'weights'),
  'no number': (None, ['--weights=a,b,c'], r'weights'),
  'nan': (None, ['--weights=nan,0,100'], r'weights'),
  'empty disk_dir': (None, ['--weights=0,0,100', '--disk_dir='], r'disk'),
  'device too small': (
    None,
    ['--device_memory=1KiB'],
    r'device.*1\.00 KiB.*[0-9]',
  ),
  'device too small for a split': (
    None,
    ['--device_memory=64KiB', '--weights=100,0,0', '--batch_size=1'],
    r'would fit|at least',
  ),
  'host too small': (
    None,
    ['--host_memory=1KiB', '--weights=0,100,0'],
    r'host.*1\.00 KiB.*would fit',
  ),
  'size without a meaning': (None, ['--device_memory=lots'], r'lots'),
  'size of nothing': (None, ['--host_memory=0'], r'positive'),
  'disk_dir is a file': (
    None,
    ['--disk_dir={}/in.jsonl', '--weights=0,0,100'],
    r'in\.jsonl',
  ),
  'disk_dir below a file': (
    None,
    ['--disk_dir={}/in.jsonl/x', '--weights=0,0,100'],
    r'in\.jsonl',
  ),
  'unwritable disk_dir': (
    None,
    ['--disk_dir=/proc/none', '--weights=0,0,100'],
    r'disk',
  ),
  'disk too small': (
    None,
    ['--weights=0,0,100', '--cache=0,0,100'],
    r'disk.*4\.00 KiB',
    SMALL_DISK,
  ),
  'no such dtype': (None, ['--dtype=int8'], r'int8'),
  'no such schedule': (None, ['--schedule=spiral'], r'spiral'),
  'no such attention': (None, ['--attention=cloud'], r'cloud'),
  'attention apart from its cache': (
    None,
    ['--attention=host', '--cache=100,0,0'],
    r'cache',
  ),
  'prefetch_depth 0': (None, ['--prefetch_depth=0'], r'prefetch_depth.*0'),
  'batch_size 0': (None, ['--batch_size=0'], r'batch_size.*0'),
  'num_batches 0': (None, ['--num_batches=0'], r'num_batches.*0'),
  'batch_size is no number': (None, ['--batch_size=x'], r'batch_size'),
  'temperature below 0': (None, ['--temperature=-1'], r'temperature.*-1'),
  'top_p 0': (None, ['--top_p=0'], r'top_p'),
  'seed below 0': (None, ['--seed=-3'], r'seed.*-3'),
  'stop id is no number': (None, ['--stop_token_ids=a'], r'stop_token_ids'),
  'empty stop string': (None, ['--stop='], r'stop'),
  'unknown flag': (None, ['--tempereture=1'], r'tempereture'),
  'not a flag': (None, ['prompts.txt'], r'prompts\.txt'),
  'output in no directory': (None, ['--output={}/no/out'], r'/no/out'),
  'output is a directory': (None, ['--output={}/one'], r'/one'),
  'output over input': (None, ['--output={}/in.jsonl'], r'overwrite'),
  'stats in no directory': (None, ['--stats={}/no/stats'], r'/no/stats'),
  'trace in no directory': (
    None,
    ['--trace={}/no/trace'],
    r'--trace.*/no/trace',
    NO_WEIGHTS,
  ),
  'trace over input': (None, ['--trace={}/in.jsonl'], r'overwrite'),
  'stats over input': (None, ['--stats={}/in.jsonl'], r'overwrite --input'),
  'trace over stats': (None, ['--trace={}/stats.json'], r'overwrite --stats'),
  'stats over record': (
    None,
    [
      '--hardware={}/in.jsonl',
      '--input={}/one/config.json',
      '--stats={}/in.jsonl',
    ],
    r'overwrite --hardware',
  ),
  'output by another name': (
    lambda place: os.link(place / 'in.jsonl', place / 'hard.jsonl'),
    ['--output={}/hard.jsonl'],
    r'overwrite --input',
  ),
  'output is a circle': (
    lambda place: (place / 'circle').symlink_to(place / 'circle'),
    ['--output={}/circle'],
    r'--output.*circle',
  ),
  'empty stats': (None, ['--stats='], r"--stats '' cannot be written"),
}


@pytest.mark.parametrize('case', REFUSED.values(), ids=REFUSED)
def test_refused(flexjax, place, case):
  change, flags, expected, *patch = case
  if change is not None:
    change(place)
  before = snapshot(place)
  done = flexjax(
    'generate',
    f'--model={place}/one',
    f'--input={place}/in.jsonl',
    f'--output={place}/out.jsonl',
    f'--stats={place}/stats.json',
    f'--disk_dir={place}/disk',
    '--dtype=float32',
    '--max_new_tokens=3',
    *(flag.replace('{}', str(place)) for flag in flags),
    patch=''.join(patch),
  )
  refuses(done, expected)
  assert snapshot(place) == before


COMMAND_LINES = {
  'unknown command': (['generat'], r"'generat'.*generate"),
  'disk split without a disk': (
    ['generate', '--prompt=a', '--weights=0,0,100'],
    r'disk',
  ),
  'neither prompt nor input': (['generate'], r'--prompt.*--input'),
  'convert nowhere': (['convert'], r'disk_dir'),
  'convert what is not there': (
    ['convert', '--model=/none/at/all', '--disk_dir={}/disk'],
    r'/none/at/all',
  ),
  'convert to a file': (['convert', '--disk_dir={}/file'], r'/file'),
  'convert with a flag of generate': (
    ['convert', '--disk_dir={}/disk', '--top_k=3'],
    r'top_k',
  ),
  'bench of no tokens': (['bench', '--gen_len=0'], r'gen_len.*0'),
  'bench with an unwritable trace': (
    ['bench', '--trace={}/no/trace'],
    r'--trace.*/no/trace',
  ),
  'bench with unwritable stats': (
    ['bench', '--stats={}/no/stats'],
    r'--stats.*/no/stats',
  ),
  'eval with a trace': (['eval', '--trace={}/trace'], r'trace'),
  'bench beyond the context': (
    ['bench', '--model=opt-125m', '--random_weights', '--prompt_len=2040'],
    r'2048',
  ),
  'preset without random weights': (
    ['bench', '--model=opt-125m'],
    r'random_weights',
  ),
}


@pytest.mark.parametrize('case', COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_command_line_refused(flexjax, tmp_path, case):
  argv, expected = case
  (tmp_path / 'file').write_text('')
  before = snapshot(tmp_path)
  refuses(flexjax(*(a.replace('{}', str(tmp_path)) for a in argv)), expected)
  assert snapshot(tmp_path) == before


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


def test_jsonl_in_and_out(flexjax, place):
  jsonl(
    '{"prompt": "ab\\u2028c"}',
    '{"prompt": [5, 6, 7], "max_new_tokens": 2, "ignore_eos": true}',
    '',
    '{"prompt": "a b"}',
    '{"prompt": [9], "temperature": 1.0, "seed": 7, "stop": ["a", "b"]}',
  )(place)
  done = flexjax(
    'generate',
    f'--model={place}/one',
    f'--input={place}/in.jsonl',
    f'--output={place}/out.jsonl',
    f'--stats={place}/stats.json',
    f'--disk_dir={place}/disk',
    '--dtype=float32',
    '--weights=30,30,40',
    '--cache=50,0,50',
    '--hidden=0,100,0',
    '--batch_size=2',
    '--max_new_tokens=4',
  )
  assert done.code == 0, done.stderr
  assert done.stdout == ''
  out = lines(place / 'out.jsonl')
  assert all(list(line) == FIELDS for line in out)
  assert [line['index'] for line in out] == [0, 1, 2, 3]
  prompts = ['ab\u2028c', [5, 6, 7], 'a b', [9]]
  assert [line['prompt'] for line in out] == prompts
  assert len(out[1]['token_ids']) == 2
  assert all(line['finish_reason'] in ('stop', 'length', 'eos') for line in out)
  assert all(isinstance(line['text'], str) for line in out)
  assert not list((place / 'disk').glob('run-*'))
  stats = json.loads((place / 'stats.json').read_text())
  assert set(stats) == set(STATS)
  for name, keys in STATS.items():
    if keys is not None:
      assert set(stats[name]) == keys, name
    else:
      assert isinstance(stats[name], (int, float)), name
  for split in stats['placement'].values():
    assert set(split) == {'device', 'host', 'disk'}
    assert sum(split.values()) == pytest.approx(1)
  tokens = sum(len(line['token_ids']) for line in out)
  assert stats['generated_tokens'] == tokens
  seconds = stats['prefill_seconds'] + stats['decode_seconds']
  assert stats['throughput_tokens_per_s'] == pytest.approx(tokens / seconds)
  assert 0 <= stats['link_busy_fraction'] <= 1
  assert stats['link_bytes']['disk_to_host'] > 0
  assert stats['peak_bytes']['disk'] > 0
  assert 'throughput' in done.stderr
  assert '\x1b' not in done.stderr  # no terminal, no colours and no bar


def test_only_newlines_end_a_line(flexjax, place):
  """JSON may hold U+2028 and the like as they are; this output does."""
  prompts = ['a\u2028b', 'c\x85d', 'e\u2029', 'f']
  jsonl(*[json.dumps({'prompt': p}, ensure_ascii=False) for p in prompts])(
    place
  )
  argv = [f'--model={place}/one', '--dtype=float32', '--max_new_tokens=2']
  out = place / 'out.jsonl'
  argv += [f'--output={out}']
  for name in ('in.jsonl', 'out.jsonl'):
    file = place / f'read-{name}'
    fields = [{'prompt': line['prompt']} for line in lines(place / name)]
    text = [json.dumps(f, ensure_ascii=False) + '\n' for f in fields]
    file.write_text(''.join(text), encoding='utf-8')
    done = flexjax('generate', f'--input={file}', *argv)
    assert done.code == 0, done.stderr
    assert [line['prompt'] for line in lines(out)] == prompts
  (place / 'in.txt').write_text('\r\n'.join(prompts), encoding='utf-8')
  done = flexjax('generate', f'--input={place}/in.txt', *argv)
  assert done.code == 0, done.stderr
  assert [line['prompt'] for line in lines(out)] == prompts


def test_text_in(flexjax, place):
  (place / 'in.txt').write_text('ab\n\ncd \nabc\n')
  shared = [f'--model={place}/one', '--dtype=float32', '--max_new_tokens=3']
  done = flexjax('generate', f'--input={place}/in.txt', *shared)
  assert done.code == 0, done.stderr
  out = [json.loads(line) for line in done.stdout.splitlines()]
  assert [line['prompt'] for line in out] == ['ab', 'cd ', 'abc']
  assert all(list(line) == FIELDS for line in out)
  done = flexjax('generate', '--prompt=ab', '--prompt=cd ', *shared)
  assert done.code == 0, done.stderr
  expected = [line['prompt'] + line['text'] for line in out[:2]]
  assert done.stdout == ''.join(line + '\n' for line in expected)


def test_bundled_model(flexjax):
  done = flexjax('generate', '--prompt=import ', '--max_new_tokens=4')
  assert done.code == 0, done.stderr
  assert done.stdout.startswith('import ')


BENCHED = {
  'checkpoint': ['--model={}/one'],
  'random weights': ['--model={}/one', '--random_weights', '--weights_seed=3'],
  'bundled, random weights': ['--random_weights'],
}


@pytest.mark.parametrize('argv', BENCHED.values(), ids=BENCHED)
def test_bench(flexjax, place, argv):
  stats = place / 'stats.json'
  argv = [a.replace('{}', str(place)) for a in argv]
  argv += ['--prompt_len=5', '--gen_len=3', '--num_prompts=3']
  done = flexjax('bench', *argv, f'--stats={stats}')
  assert done.code == 0, done.stderr
  figures = json.loads(stats.read_text())
  assert figures['generated_tokens'] == 9
  assert figures['decode_tokens_per_s'] > 0
  assert 'throughput' in done.stderr


TRACED = {
  'generate': [
    '--input={}/in.jsonl',
    '--output={}/out.jsonl',
    '--max_new_tokens=4',
    '--ignore_eos',
  ],
  'bench': [
    '--prompt_len=5',
    '--gen_len=4',
    '--num_prompts=2',
    '--repeats=2',
  ],
}


@pytest.mark.parametrize('command', TRACED)
def test_trace(flexjax, place, command):
  trace, stats = place / 'trace.json', place / 'stats.json'
  trace.write_text('an older one')
  done = flexjax(
    command,
    f'--model={place}/one',
    f'--disk_dir={place}/disk',
    '--weights=30,30,40',
    '--cache=0,50,50',
    '--hidden=0,50,50',
    '--batch_size=1',
    '--num_batches=2',
    f'--trace={trace}',
    f'--stats={stats}',
    *(a.replace('{}', str(place)) for a in TRACED[command]),
  )
  assert done.code == 0, done.stderr
  events = json.loads(trace.read_text())['traceEvents']
  spans = [e for e in events if e['ph'] == 'X']
  assert [s['ts'] for s in spans] == sorted(s['ts'] for s in spans)
  assert spans[0]['ts'] == 0
  tracks = {
    e['args']['name']: e['tid'] for e in events if e['name'] == 'thread_name'
  }
  # Steps, layers and batches of one run; the warm-up is not in it.
  computed = [s for s in spans if s['tid'] == tracks['device']]
  assert len({s['name'] for s in computed}) == len(computed) == 4 * 6 * 2
  for link, expected in json.loads(stats.read_text())['link_bytes'].items():
    crossed = [s for s in spans if s['tid'] == tracks[link]]
    assert sum(s['args']['bytes'] for s in crossed) == expected > 0
  assert not list(place.glob('*.new'))


TEXT = 'import os\r\n\r\n\r\ndef f(a, b):\n  return a + b  # é\n' * 8
LAST_WORDS = [
  'for i in range(10):\n  for j in',
  'if x is not\n  None',
  'import os\nimport sys\nimport os\nimport sys\n',
  'def f(self): return self.zebra',
]
PLACED = {
  'device': [],
  'host and disk': ['--weights=0,50,50', '--disk_dir={}/disk'],
  'disk, row': [
    '--weights=0,0,100',
    '--hidden=0,0,100',
    '--schedule=row',
    '--disk_dir={}/disk',
    '--batch_size=2',
    '--num_batches=2',
  ],
}


@pytest.fixture(scope='session')
def bundled():
  """The bundled model and its tokenizer as transformers reads them."""
  model = transformers.OPTForCausalLM.from_pretrained(
    BUNDLED, dtype=torch.float32
  )
  return model.eval(), transformers.AutoTokenizer.from_pretrained(BUNDLED)


def evaluate(flexjax, place, text, *argv):
  """Runs eval; returns its figures, which --stats has, too."""
  (place / 'text').write_bytes(text.encode())
  done = flexjax(
    'eval',
    f'--input={place}/text',
    f'--stats={place}/stats.json',
    '--dtype=float32',
    *(a.replace('{}', str(place)) for a in argv),
  )
  assert done.code == 0, done.stderr
  figures = json.loads(done.stdout)
  assert done.stdout == json.dumps(figures) + '\n'
  stats = json.loads((place / 'stats.json').read_text())
  assert set(stats) == {*STATS, 'scored_tokens', 'eval'}
  assert stats['eval'] == figures
  assert f'perplexity  {figures["perplexity"]:.6g}'.split() in [
    line.split() for line in done.stderr.splitlines()
  ]
  return figures


@pytest.mark.parametrize('argv', PLACED.values(), ids=PLACED)
def test_perplexity(flexjax, tmp_path, bundled, argv):
  model, tokenizer = bundled
  ids = tokenizer(TEXT, add_special_tokens=False)['input_ids']
  logprobs = []
  while len(logprobs) < len(ids):  # whole windows are 1 + 47 tokens
    begin = max(0, len(logprobs) - 30)
    row = [2, *ids[begin : begin + 47]]
    p = logits_of(model, row).log_softmax(-1)[range(len(row) - 1), row[1:]]
    logprobs += p[len(logprobs) - begin :].tolist()
  nll = -sum(logprobs) / len(ids)
  argv = [*argv, '--window=48', '--stride=17']
  assert evaluate(flexjax, tmp_path, TEXT, *argv) == {
    'metric': 'perplexity',
    'perplexity': pytest.approx(math.exp(nll), rel=1e-4),
    'nll': pytest.approx(nll, rel=1e-4),
    'tokens': len(ids),
    'bits_per_byte': pytest.approx(
      nll * len(ids) / math.log(2) / len(TEXT.encode()), rel=1e-4
    ),
  }


@pytest.mark.parametrize('argv', PLACED.values(), ids=PLACED)
def test_last_token(flexjax, tmp_path, bundled, argv):
  model, tokenizer = bundled
  right, total = 0, 0.0
  for text in LAST_WORDS:
    context = tokenizer(text.rstrip().rsplit(maxsplit=1)[0])['input_ids']
    ids = tokenizer(text.rstrip())['input_ids']
    assert ids[: len(context)] == context
    logits = logits_of(model, ids)[len(context) - 1 : -1]
    word = torch.tensor(ids[len(context) :])
    right += bool((logits.argmax(-1) == word).all())
    total += float(logits.log_softmax(-1)[range(len(word)), word].sum())
  assert 0 < right < len(LAST_WORDS)
  rows = [json.dumps({'text': t, 'source': 'x'}) + '\n' for t in LAST_WORDS]
  text = '\n'.join(rows)
  argv = [*argv, '--metric=last_token']
  assert evaluate(flexjax, tmp_path, text, *argv) == {
    'metric': 'last_token',
    'accuracy': right / len(LAST_WORDS),
    'perplexity': pytest.approx(math.exp(-total / len(LAST_WORDS)), rel=1e-4),
    'examples': len(LAST_WORDS),
  }


def test_perplexity_without_a_leading_token(flexjax, place):
  """Then the first token has nothing before it, and does not count."""
  config = {'tokenizer_class': 'GPT2Tokenizer'}
  (place / 'one/tokenizer_config.json').write_text(json.dumps(config))
  model = transformers.OPTForCausalLM.from_pretrained(place / 'one').eval()
  text = 'thisisatext' * 3
  ids = json.loads((place / 'one/vocab.json').read_text())
  row = [ids[c] for c in text]
  p = logits_of(model, row).log_softmax(-1)[range(len(row) - 1), row[1:]]
  figures = evaluate(flexjax, place, text, '--model={}/one')
  assert figures['tokens'] == len(text) - 1
  assert figures['nll'] == pytest.approx(-float(p.mean()), rel=1e-4)
  (place / 'text').write_text('a')
  argv = ['eval', f'--model={place}/one', f'--input={place}/text']
  refuses(flexjax(*argv), r'2 tokens.*got 1')
  argv += ['--window=9', '--stride=9']
  refuses(flexjax(*argv), r'stride.*1 and 8.*got 9')


LINES = ['--metric=last_token', '--input={}/in.jsonl']
# name: (what is changed, flags, what the line says)
NOT_EVALUATED = {
  'no input': (None, ['--input='], r'--input'),
  'no input file': (None, ['--input={}/none.txt'], r'none\.txt'),
  'input is a directory': (None, ['--input={}/one'], r'/one'),
  'not UTF-8': (write('in.txt', b'ab\xff\xfe'), [], r'in\.txt'),
  'empty': (write('in.txt', ''), [], r'2 tokens.*got 1'),
  'no such metric': (None, ['--metric=bleu'], r'metric.*perplexity.*bleu'),
  'window 1': (None, ['--window=1'], r'window.*between 2 and 40.*\b1$'),
  'window beyond the context': (None, ['--window=41'], r'window.*40.*41'),
  'window is no number': (None, ['--window=x'], r'window'),
  'stride 0': (None, ['--stride=0'], r'stride.*between 1 and 39.*\b0$'),
  'stride below 0': (None, ['--stride=-1'], r'stride.*-1'),
  'stride of a window': (
    None,
    ['--window=8', '--stride=8'],
    r'stride.*between 1 and 7.*\b8$',
  ),
  'window for words': (None, [*LINES, '--window=8'], r'--window.*perplexity'),
  'stride for words': (None, [*LINES, '--stride=8'], r'--stride.*perplexity'),
  'no lines': (write('in.jsonl', '\n'), LINES, r'in\.jsonl.*no examples'),
  'line is not JSON': (jsonl('{"text": "a b"}', '', '{'), LINES, r'jsonl:3\b'),
  'line is no object': (jsonl('["text"]'), LINES, r'jsonl:1\b.*object'),
  'line without text': (
    jsonl('{"prompt": "a b"}'),
    LINES,
    r"jsonl:1\b.*'text'",
  ),
  'text is no text': (jsonl('{"text": [5, 6]}'), LINES, r"jsonl:1\b.*'text'"),
  'single word': (
    jsonl('{"text": "a b"}', '{"text": " word\\n"}'),
    LINES,
    r'jsonl:2\b.*two words',
  ),
  'words without tokens': (
    jsonl('{"text": "a \u00e9"}'),
    LINES,
    r'jsonl:1\b.*no tokens',
  ),
  'lone surrogate': (
    jsonl(r'{"text": "a \ud800"}'),
    LINES,
    r'jsonl:1\b.*surrogate',
  ),
  'text too long': (
    jsonl('{"text": "a b"}', json.dumps({'text': 'a ' * 39 + 'b'})),
    LINES,
    r'jsonl:2\b.*\b41\b.*\b40\b',
  ),
  'no tokenizer': (
    None,
    ['--model=opt-125m', '--random_weights'],
    r'tokenizer',
  ),
  'stats over input': (None, ['--stats={}/in.txt'], r'overwrite'),
  'stats in no directory': (None, ['--stats={}/no/stats'], r'/no/stats'),
  'flag of generate': (None, ['--temperature=1'], r'temperature'),
}


@pytest.mark.parametrize('case', NOT_EVALUATED.values(), ids=NOT_EVALUATED)
def test_not_evaluated(flexjax, place, case):
  change, flags, expected = case
  (place / 'in.txt').write_text('some text')
  if change is not None:
    change(place)
  before = snapshot(place)
  done = flexjax(
    'eval',
    f'--model={place}/one',
    f'--input={place}/in.txt',
    f'--stats={place}/stats.json',
    f'--disk_dir={place}/disk',
    '--weights=0,50,50',
    *(flag.replace('{}', str(place)) for flag in flags),
    patch=NO_WEIGHTS,
  )
  refuses(done, expected)
  assert snapshot(place) == before


@pytest.mark.parametrize(
  'argv',
  [
    [],
    ['help'],
    ['--help'],
    ['generate', '--help'],
    ['eval', '--help'],
    ['convert', '--help'],
  ],
  ids=' '.join,
)
def test_help(flexjax, argv):
  done = flexjax(*argv)
  assert (done.code, done.stderr) == (0, '')
  assert '--' in done.stdout


def test_version(flexjax):
  done = flexjax('--version')
  assert (done.code, done.stderr) == (0, '')
  assert done.stdout == f'flexjax {importlib.metadata.version("flexjax")}\n'


def start(*argv, **kwargs):
  # A shell's background job ignores it, and so would what the job starts.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  command = [sys.executable, '-m', 'flexjax', *map(str, argv)]
  return subprocess.Popen(
    command,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def wait_for(process, condition):
  """Returns once the condition holds; fails where the process ends first."""
  until = time.monotonic() + 60
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < until
    time.sleep(0.005)


def test_interrupted_run_keeps_what_is_finished(place):
  count = 2000
  jsonl(*[json.dumps({'prompt': [5 + n % 90, 7]}) for n in range(count)])(place)
  out = place / 'out.jsonl'
  with start(
    'generate',
    f'--model={place}/one',
    f'--input={place}/in.jsonl',
    f'--output={out}',
    f'--stats={place}/stats.json',
    f'--trace={place}/trace.json',
    f'--disk_dir={place}/disk',
    '--dtype=float32',
    '--weights=0,50,50',
    '--cache=0,50,50',
    '--batch_size=2',
    '--num_batches=2',
    '--max_new_tokens=20',
    '--ignore_eos',
  ) as process:
    wait_for(process, lambda: out.exists() and out.read_text().count('\n') > 8)
    assert list((place / 'disk').glob('run-*'))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert stdout == ''
  assert re.fullmatch(r'flexjax: [^\n]+\n', stderr)
  results = lines(out)
  assert 8 < len(results) < count
  assert [r['index'] for r in results] == list(range(len(results)))
  assert all(len(r['token_ids']) == 20 for r in results)
  assert not list((place / 'disk').glob('run-*'))
  names = {p.name for p in place.iterdir()}
  assert names == {'one', 'other', 'shards', 'in.jsonl', 'out.jsonl', 'disk'}


def weights_in(disk):
  """Everything that a disk tier holds, without times and lists of files."""
  return {
    path.relative_to(disk): path.read_bytes()
    for path in disk.rglob('*')
    if path.is_file()
  }


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
    wait_for(process, manifest.exists)
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
  refuses(done, r'disk')
  assert not out.exists()
  assert not list((place / 'disk').glob('run-*'))


def test_pickled_code_is_not_run(flexjax, place):
  """A .bin checkpoint is read, one that would run code is refused."""
  state = load_file(place / 'one' / 'model.safetensors')
  (place / 'one' / 'model.safetensors').unlink()
  file = place / 'one' / 'pytorch_model.bin'
  torch.save(state, file)
  argv = ['generate', f'--model={place}/one', f'--input={place}/in.jsonl']
  argv += ['--dtype=float32', '--max_new_tokens=2']
  done = flexjax(*argv)
  assert done.code == 0, done.stderr
  mark = place / 'ran'
  torch.save({**state, 'x': _Evil(mark)}, file)
  refuses(flexjax(*argv), r'pytorch_model\.bin')
  assert not mark.exists()


class _Evil:
  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


# Weights in fewer bits.

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


def has_weights(manifest):
  """The folder is claimed before the first weights are there."""
  return manifest.exists() and json.loads(manifest.read_text())['complete']


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
  file = place / 'one' / 'model.safetensors'
  tensors = load_file(file)
  tensor = tensors[PREFIX + name]
  tensor.view(-1)[tensor.numel() // 2 + 1] = number
  save_file(tensors, file, {'format': 'pt'})
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
