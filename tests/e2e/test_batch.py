"""Jobs: every request answered once, whatever happens meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import make_checkpoint, save_tokenizer

import flexjax
from flexjax import InputError
from flexjax.apps import batch
from flexjax.apps.journal import Journal

ENVIRONMENT = {
  **os.environ,
  'JAX_PLATFORMS': 'cpu',
  'HF_HUB_OFFLINE': '1',
  'PYTHONWARNINGS': 'ignore',
}
COUNT = 90
LONELY = 'request-7'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('batch') / 'model'
  make_checkpoint(path)
  save_tokenizer(path)
  return path


@pytest.fixture(scope='module')
def job(tmp_path_factory):
  """An input of ragged requests, some of which cannot be answered."""
  rng = np.random.default_rng(0)
  lines = []
  for n in range(COUNT):
    body = {
      'prompt': rng.integers(4, 60, rng.integers(1, 20)).tolist(),
      'max_tokens': int(rng.integers(1, 9)),
      'temperature': float(n % 3) / 2,
    }
    if n % 10 == 3:
      body['n'] = 2
    if n % 15 == 4:
      body = {'prompt': [5, 6], 'max_tokens': 100_000}
    if n % 15 == 5:
      body['logprobs'] = 9
    line = {
      'custom_id': f'request-{n}',
      'method': 'POST',
      'url': '/v1/completions',
      'body': body,
    }
    lines.append(json.dumps(line))
  path = tmp_path_factory.mktemp('input') / 'requests.jsonl'
  path.write_text('\n'.join(lines) + '\n\n')
  return path


def command(model, source, target, *more):
  return [
    *(sys.executable, '-m', 'flexjax', 'batch', f'--model={model}'),
    *(f'--input={source}', f'--output={target}', '--dtype=float32'),
    *('--batch_size=4', '--num_batches=2', '--stop_token_ids=3', *more),
  ]


def run(*args, **options):
  done = subprocess.run(
    command(*args),
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
    **options,
  )
  return done.returncode, done.stderr


def results(path):
  lines = path.read_text().splitlines()
  return [json.loads(line) for line in lines if line]


def by_name(path):
  found = {line['custom_id']: line for line in results(path)}
  assert len(found) == len(results(path))
  return found


@pytest.fixture(scope='module')
def whole(model, job, tmp_path_factory):
  """The results of a job that nothing stopped."""
  path = tmp_path_factory.mktemp('whole') / 'results.jsonl'
  stats = path.with_name('stats.json')
  code, stderr = run(model, job, path, f'--stats={stats}')
  assert code == 1, stderr  # some were refused
  return path, json.loads(stats.read_text())


def test_every_request_is_answered_once(whole, job):
  path, stats = whole
  found = by_name(path)
  assert set(found) == {f'request-{n}' for n in range(COUNT)}
  refused = {f'request-{n}' for n in range(COUNT) if n % 15 in (4, 5)}
  assert {name for name, line in found.items() if line['error']} == refused
  made = given = 0
  for request in results(job):
    line = found[request['custom_id']]
    if line['error']:
      assert line['response']['status_code'] == 400
      continue
    asked, body = request['body'], line['response']['body']
    assert len(body['choices']) == asked.get('n', 1)
    assert body['usage']['prompt_tokens'] == len(asked['prompt'])
    assert body['usage']['completion_tokens'] <= (
      asked['max_tokens'] * asked.get('n', 1)
    )
    made += body['usage']['completion_tokens']
    given += len(asked['prompt']) * asked.get('n', 1)
  assert stats['answered'] == COUNT - len(refused)
  assert stats['failed'] == len(refused)
  assert stats['new_tokens'] == made
  assert stats['prompt_tokens'] == given
  assert 0 < stats['padding_waste'] < 1


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_results(whole, model, job, tmp_path):
  path = tmp_path / 'results.jsonl'
  sizes = []
  for kill in range(4):
    with subprocess.Popen(
      command(model, job, path),
      env=ENVIRONMENT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ) as process:
      wait_for(lambda n=kill: lines(path) > 16 * n, process)
      process.send_signal(signal.SIGKILL)
    sizes.append(lines(path))
  assert sizes[0] < COUNT
  code, stderr = run(model, job, path)
  assert code == 1, stderr
  assert sorted(path.read_text().splitlines()) == sorted(
    whole[0].read_text().splitlines()
  )
  before = path.read_text()
  assert run(model, job, path)[0] == 1  # there is nothing left to do
  assert path.read_text() == before


def lines(path):
  return path.read_bytes().count(b'\n') if path.exists() else 0


def wait_for(ready, process):
  end = time.time() + 120
  while not ready():
    assert process.poll() is None or ready(), 'the job ended too soon'
    assert time.time() < end
    time.sleep(0.01)


def test_blocks_are_parted_where_memory_is_short(
  whole, model, job, tmp_path, monkeypatch
):
  """As when a job goes on with less; one that never fits is refused."""
  complete, sizes = batch.complete, []

  def short(llm, asked, **options):
    if len(asked) > 2 or asked[0].prompt == hopeless:
      raise InputError('does not fit: needs more')
    sizes.append(len(asked))
    return complete(llm, asked, **options)

  first = next(line for line in results(job) if line['custom_id'] == LONELY)
  hopeless = first['body']['prompt']
  monkeypatch.setattr(batch, 'complete', short)
  path = tmp_path / 'results.jsonl'
  options = {'dtype': 'float32', 'batch_size': 4, 'num_batches': 2}
  with flexjax.load(model, **options) as llm:
    journal = Journal(path, {})
    default = flexjax.SamplingParams()
    assert batch.Job(llm, job, journal, default=default).run()
    journal.close()
  assert max(sizes) == 2
  found, expected = by_name(path), by_name(whole[0])
  assert 'does not fit' in found.pop(LONELY)['error']['message']
  del expected[LONELY]
  assert found == expected


def test_in_the_order_of_the_input(whole, model, job, tmp_path):
  path = tmp_path / 'ordered.jsonl'
  assert run(model, job, path, '--ordered')[0] == 1
  names = [line['custom_id'] for line in results(path)]
  assert names == [line['custom_id'] for line in results(job)]
  assert by_name(path) == by_name(whole[0])


def test_a_size_that_is_given_is_kept(model, job, tmp_path, monkeypatch):
  complete, rows = batch.complete, []

  def counted(llm, wanted, **options):
    rows.append(sum(one.n for one in wanted))
    return complete(llm, wanted, **options)

  monkeypatch.setattr(batch, 'complete', counted)
  with flexjax.load(model, dtype='float32', batch_size=4, num_batches=2) as llm:
    journal = Journal(tmp_path / 'out.jsonl', {})
    assert batch.Job(llm, job, journal, default=flexjax.SamplingParams()).run()
    journal.close()
  assert max(rows) == 8


def test_lines_that_cannot_be_told(model, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  good = {
    'custom_id': 'a',
    'method': 'POST',
    'url': '/v1/completions',
    'body': {'prompt': [5] * 3, 'max_tokens': 50},
  }
  source.write_text('17\n' + json.dumps(good) + '\n{"cust\n')
  code, stderr = run(model, source, target, '--ordered')
  assert code == 1, stderr
  found = results(target)
  assert [line['response']['status_code'] for line in found] == [400] * 3
  message = found[1]['error']['message']
  assert 'max_tokens' in message
  assert 'truncate_prompt' not in message
  assert 'max_new_tokens' not in message
  for output in ('/dev/null', tmp_path):
    code, stderr = run(model, source, output)
    assert code == 2, stderr
    assert 'is not a file' in stderr


def test_in_order_nothing_is_done_twice(model, job, tmp_path, monkeypatch):
  complete, asked = batch.complete, []

  def counted(llm, wanted, **options):
    asked.append(len(wanted))
    return complete(llm, wanted, **options)

  monkeypatch.setattr(batch, 'complete', counted)
  default = flexjax.SamplingParams()
  options = {'dtype': 'float32', 'batch_size': 4, 'num_batches': 2}

  def run_once(path, blocks):
    """Answers so many blocks of the job, or all of it."""
    with flexjax.load(model, **options) as llm:
      journal = Journal(path, {})
      ordered = batch.Job(llm, job, journal, default=default, ordered=True)
      begun = len(asked)

      def on_block():
        ordered.stopping = len(asked) - begun >= blocks

      ordered.on_block = on_block
      ended = ordered.run()
      journal.close()
    return ended

  whole, stopped = tmp_path / 'whole.jsonl', tmp_path / 'stopped.jsonl'
  assert run_once(whole, COUNT)
  once = list(asked)
  asked.clear()
  assert not run_once(stopped, 2)
  assert lines(stopped) == 0
  assert not run_once(stopped, 3)
  assert run_once(stopped, COUNT)
  assert asked == once
  assert stopped.read_text() == whole.read_text()


@pytest.mark.slow
def test_a_signal_ends_the_job_after_its_block(whole, model, job, tmp_path):
  path = tmp_path / 'results.jsonl'
  with subprocess.Popen(
    command(model, job, path), env=ENVIRONMENT, stderr=subprocess.PIPE
  ) as process:
    wait_for(lambda: lines(path) > 12, process)
    process.send_signal(signal.SIGINT)
    code, stderr = process.wait(120), process.stderr.read().decode()
  assert code == 130
  assert 'the same command goes on' in stderr
  assert 12 < lines(path) < COUNT
  assert run(model, job, path)[0] == 1
  assert by_name(path) == by_name(whole[0])


def test_what_is_not_this_job_is_refused(whole, model, job, tmp_path):
  path = tmp_path / 'results.jsonl'
  path.write_bytes(whole[0].read_bytes())
  journal = whole[0].with_name(whole[0].name + '.job')
  path.with_name('results.jsonl.job').write_bytes(journal.read_bytes())
  before = path.read_bytes()
  other = tmp_path / 'other.jsonl'
  other.write_text(job.read_text() + '{"prompt": "x"}\n')
  for arguments in (
    (model, other, path),
    (model, job, path, '--seed=5'),
    (model, job, path, '--cache_bits=8', '--group_size=32'),
    (model, tmp_path / 'absent', path),
    (model, job, job),
    (model, job, path, f'--stats={path}'),
    (model, job, tmp_path / 'absent' / 'out'),
  ):
    code, stderr = run(*arguments)
    assert code == 2, stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert path.read_bytes() == before
  state = path.with_name('results.jsonl.job')
  code, _ = run(model, job, path, f'--stats={state}')
  assert code == 2
  assert json.loads(state.read_text())['done']
  state.write_text('{}')
  code, stderr = run(model, job, path)
  assert code == 2
  assert 'no journal' in stderr
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('\n')
  code, stderr = run(model, empty, tmp_path / 'new.jsonl')
  assert code == 2
  assert 'no requests' in stderr
  assert not (tmp_path / 'new.jsonl').exists()


def test_log_probabilities_and_echo(model, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  bodies = [
    {'prompt': 'abc', 'max_tokens': 0, 'echo': True, 'logprobs': 2},
    {'prompt': 'abc', 'max_tokens': 3, 'temperature': 0, 'logprobs': 0},
    {'prompt': 'abc', 'max_tokens': 3, 'temperature': 0},
    {'prompt': [5] * 40, 'max_tokens': 0, 'echo': True, 'logprobs': 0},
    {'prompt': [5] * 41, 'max_tokens': 0, 'echo': True, 'logprobs': 0},
  ]
  source.write_text(
    '\n'.join(
      json.dumps(
        {
          'custom_id': str(n),
          'method': 'POST',
          'url': '/v1/completions',
          'body': body,
        }
      )
      for n, body in enumerate(bodies)
    )
  )
  code, stderr = run(model, source, target, '--ordered')
  assert code == 1, stderr
  echoed, scored, plain, whole, beyond = (
    line['response']['body'] for line in results(target)
  )
  (choice,) = whole['choices']
  assert len(choice['logprobs']['token_logprobs']) == 40  # all of the context
  assert 'at most 40' in beyond['error']['message']
  (choice,) = echoed['choices']
  assert choice['text'] == 'abc'
  assert ''.join(choice['logprobs']['tokens']) == 'abc'
  assert choice['logprobs']['token_logprobs'][0] is None
  assert all(len(top) >= 2 for top in choice['logprobs']['top_logprobs'][1:])
  assert echoed['usage']['completion_tokens'] == 0
  assert scored['choices'][0]['text'] == plain['choices'][0]['text']
  assert all(p <= 0 for p in scored['choices'][0]['logprobs']['token_logprobs'])
  assert plain['choices'][0]['logprobs'] is None


def test_doubles_and_plain_lines(model, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  rows = [
    {'prompt': [5, 6, 7], 'max_new_tokens': 3, 'custom_id': 'a'},
    {'prompt': [5], 'max_new_tokens': 1},
    {'prompt': [5, 6, 7], 'max_new_tokens': 3, 'custom_id': 'a'},
    {'prompt': []},
    {'prompt': [10**6]},
    {'prompt': [5], 'custom_id': '\ud800', 'max_new_tokens': 1},
    {'prompt': [5], 'custom_id': 7},
  ]
  source.write_text('\n'.join(map(json.dumps, rows)))
  code, stderr = run(model, source, target, '--ordered')
  assert code == 1, stderr
  found = results(target)
  assert [line['index'] for line in found] == list(range(7))
  assert len(found[0]['token_ids']) <= 3
  assert found[0]['custom_id'] == 'a'
  assert len(found[1]['token_ids']) == 1
  assert 'earlier line' in found[2]['error']
  assert found[3]['error'] == 'the prompt is empty'
  assert 'outside the vocabulary' in found[4]['error']
  assert found[5]['custom_id'] == '\ud800'
  assert found[6]['error'] == 'custom_id must be text'
