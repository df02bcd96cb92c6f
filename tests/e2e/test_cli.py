"""The command line: what it refuses and how, and its help."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.commands import (
  NO_WEIGHTS,
  SMALL_DISK,
  edit,
  jsonl,
  refuses,
  shard,
  snapshot,
  start,
  wait_for,
  write,
)

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
  'negative percentage': (
    None,
    ['--weights=150,-50,0'],
    r'weights.*none below 0',
  ),
  'no boolean': (
    None,
    ['--overlap=maybe'],
    r'--overlap=maybe: Non-boolean argument to boolean flag$',
  ),
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
  'disk_dir that no plan needs is a file': (
    None,
    ['--disk_dir={}/in.jsonl', '--weights=100,0,0'],
    r'disk_dir.*in\.jsonl.*not a directory',
  ),
  'disk_dir that no plan needs is below a file': (
    None,
    ['--disk_dir={}/in.jsonl/x', '--weights=100,0,0'],
    r"disk_dir.*in\.jsonl/x.*'[^']*/in\.jsonl' is not a directory",
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


def test_interrupted_while_libraries_are_imported(tmp_path):
  """Though they lose it: here, one that carries on whatever is raised."""
  (tmp_path / 'jax.py').write_text(
    textwrap.dedent("""\
      import pathlib
      import time
      pathlib.Path('importing').touch()
      for _ in range(300):
        try:
          time.sleep(0.1)
        except BaseException:
          pass
    """)
  )
  with start('generate', cwd=tmp_path) as process:
    wait_for(process, (tmp_path / 'importing').exists)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
  assert process.returncode == -signal.SIGINT
  assert (stdout, stderr) == ('', '')


def test_nothing_is_compiled_into_an_interpreter_that_exits():
  """XLA compiles in threads, which crash when its client goes at exit."""
  program = """
    import atexit, os
    from flexjax.cli import convert, main

    def run():
      print('said')
      raise KeyboardInterrupt

    convert.run = run
    atexit.register(os.abort)
    main.main()
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(program), 'convert'],
    capture_output=True,
    check=False,
    text=True,
  )
  assert (done.returncode, done.stdout) == (130, 'said\n')
  assert done.stderr == 'flexjax: interrupted\n'


def test_what_it_can_do_is_said_without_jax(tmp_path):
  (tmp_path / 'jax.py').write_text('raise SystemExit(9)')
  for flag in ('--help', '--version'):
    with start(flag, cwd=tmp_path) as process:
      stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert 'flexjax' in stdout
