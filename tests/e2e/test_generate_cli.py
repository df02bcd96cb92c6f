"""flexjax generate and bench: what they read and write."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import FIELDS, STATS, jsonl, lines, refuses, start, wait_for


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
