"""Does a job of many requests survive, stay small, and waste little?

`kills`: a job is killed at random moments and goes on; its results against
those of a job that nothing stopped. `ordered`: the same, with results in the
input's order. `flat`: resident memory over many short
requests. `ragged`: useful tokens per second on lengths of all kinds, against
blocks in the input's order padded to the longest. All with the bundled model.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from absl import app, flags

import flexjax
from experiments import common
from flexjax.config import SamplingParams

_NAMES = ['kills', 'ordered', 'flat', 'ragged']
_PARTS = flags.DEFINE_list('parts', _NAMES, ', '.join(_NAMES))
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_RESULTS = flags.DEFINE_string(
  'results', str(Path(__file__).parent), 'Folder of the tables.'
)
_REQUESTS = flags.DEFINE_integer('requests', None, 'Default: by part.')
_KILLS = flags.DEFINE_integer('kills', 20, 'How often a job is killed.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the requests, and of the kills.')
VOCABULARY = 4000  # ids that are drawn from, of 4,096


def ragged_requests(count: int) -> list[dict[str, Any]]:
  """Prompts of lognormal length, 16 to 512; 1 to 64 new tokens."""
  rng = np.random.default_rng(_SEED.value)
  lengths = np.clip(rng.lognormal(4.5, 0.8, count), 16, 512).astype(int)
  return [
    {
      'custom_id': f'request-{n}',
      'prompt': rng.integers(4, VOCABULARY, length).tolist(),
      'max_new_tokens': int(rng.integers(1, 65)),
      'temperature': 0.5 * (n % 3),
      'ignore_eos': True,
    }
    for n, length in enumerate(lengths)
  ]


def short_requests(count: int) -> list[dict[str, Any]]:
  rng = np.random.default_rng(_SEED.value)
  return [
    {
      'custom_id': f'request-{n}',
      'prompt': rng.integers(4, VOCABULARY, rng.integers(4, 13)).tolist(),
      'max_new_tokens': 2,
      'ignore_eos': True,
    }
    for n in range(count)
  ]


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
  path.write_text(''.join(json.dumps(r) + '\n' for r in requests))
  return path


def start(source: Path, target: Path, *more: str) -> subprocess.Popen:
  command = [sys.executable, '-m', 'flexjax', 'batch', '--dtype=float32']
  command += [f'--input={source}', f'--output={target}', *more]
  return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def committed(path: Path) -> int:
  """Lines that are there, or kept aside until it is their turn."""
  files = path, path.with_name(path.name + '.job.kept')
  return sum(f.read_bytes().count(b'\n') for f in files if f.exists())


def results(path: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def kills(folder: Path, *more: str) -> dict[str, Any]:
  count = _REQUESTS.value or 2000
  source = write(folder / 'in.jsonl', ragged_requests(count))
  whole, killed = folder / 'whole.jsonl', folder / 'killed.jsonl'
  began = time.time()
  assert start(source, whole, *more).wait() == 0
  seconds = time.time() - began
  chance = random.Random(_SEED.value)
  lines, at_work = [], 0
  for _ in range(_KILLS.value):
    with start(source, killed, *more) as process:
      # Some before a block is done, some in the midst of several.
      try:
        process.wait(chance.uniform(2, 6 + seconds / 14))
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        at_work += 1
    lines.append(committed(killed))
  assert start(source, killed, *more).wait() == 0
  expected = {r['custom_id']: r for r in results(whole)}
  found = results(killed)
  names = [r['custom_id'] for r in found]
  return {
    'requests': count,
    'kills': at_work,
    'lines_at_kills': ' '.join(map(str, lines)),
    'answered_twice': len(names) - len(set(names)),
    'missing': len(set(expected) - set(names)),
    'different': sum(r != expected[r['custom_id']] for r in found),
    'uninterrupted_s': round(seconds, 1),
  }


def flat(folder: Path) -> dict[str, Any]:
  count = _REQUESTS.value or 100_000
  source = write(folder / 'in.jsonl', short_requests(count))
  target, stats = folder / 'out.jsonl', folder / 'stats.json'
  seen: list[tuple[int, int]] = []  # bytes of results, resident set
  with start(source, target, f'--stats={stats}') as process:
    watched = psutil.Process(process.pid)
    while process.poll() is None:
      size = target.stat().st_size if target.exists() else 0
      try:
        seen.append((size, watched.memory_info().rss))
      except psutil.NoSuchProcess:
        break
      time.sleep(0.2)
  assert process.returncode == 0
  total = target.stat().st_size
  middle = [rss for size, rss in seen if 0.1 * total <= size <= 0.9 * total]
  figures = json.loads(stats.read_text())
  return {
    'requests': count,
    'answered': figures['answered'],
    'seconds': round(figures['seconds'], 1),
    'overhead': round(figures['overhead'], 4),
    'rss_at_10_percent_mib': round(middle[0] / 2**20),
    'rss_at_90_percent_mib': round(middle[-1] / 2**20),
    'rss_spread_mib': round((max(middle) - min(middle)) / 2**20),
  }


def ragged(folder: Path) -> dict[str, Any]:
  count = _REQUESTS.value or 2000
  requests = ragged_requests(count)
  source = write(folder / 'in.jsonl', requests)
  stats = folder / 'stats.json'
  began = time.time()
  code = start(source, folder / 'out.jsonl', f'--stats={stats}').wait()
  assert code == 0
  job = time.time() - began
  figures = json.loads(stats.read_text())
  useful = figures['prompt_tokens'] + figures['new_tokens']
  fixed, ours = fixed_order(requests), results(folder / 'out.jsonl')
  return {
    'requests': count,
    'useful_tokens': useful,
    'job_s': round(job, 1),
    'job_padding': round(figures['padding_waste'], 3),
    'shapes': len(figures['shapes']),
    'fixed_order_s': round(fixed[0], 1),
    'fixed_order_padding': round(1 - useful / fixed[1], 3),
    'ratio': round(fixed[0] / job, 2),
    'same_lengths': sum(
      len(r['token_ids']) == requests[r['index']]['max_new_tokens']
      for r in ours
    ),
  }


def fixed_order(requests: list[dict[str, Any]]) -> tuple[float, int]:
  """Seconds and columns of blocks in the input's order, each as long as the
  longest request of all; opening the model included, as in the job's time."""
  params = [
    SamplingParams(
      max_new_tokens=r['max_new_tokens'],
      temperature=r['temperature'],
      ignore_eos=True,
    )
    for r in requests
  ]
  prompts = [r['prompt'] for r in requests]
  longest = max(map(len, prompts))
  most = max(p.max_new_tokens for p in params)
  began = time.time()
  with flexjax.load(dtype='float32') as llm:
    llm.settle(*llm.block(longest, most, within=0.9))
    llm.generate(prompts, params)
  return time.time() - began, len(requests) * (longest + most)


def main(argv: list[str]) -> None:
  del argv
  for part in _PARTS.value:
    gflops = common.cpu_gflops()
    with tempfile.TemporaryDirectory() as folder:
      fields = {
        'kills': kills,
        'ordered': lambda folder: kills(folder, '--ordered'),
        'flat': flat,
        'ragged': ragged,
      }[part](Path(folder))
    fields = {'commit': _COMMIT.value, **fields, 'cpu_gflops': gflops}
    common.append(Path(_RESULTS.value) / f'{part}.csv', fields)


if __name__ == '__main__':
  app.run(main)
