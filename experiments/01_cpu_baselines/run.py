"""flexjax against `transformers` and `accelerate` on one CPU machine.

Each measurement is a process of its own; the sides take turns, so that both
see the same machine, and each row of results.csv has both. `others.py` is the
other side. `--parts` picks from PARTS.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from experiments import common

HERE = Path(__file__).parent
_PARTS = flags.DEFINE_list('parts', None, 'Parts to run; default all.')
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Turns; medians are written.')
_WORK_DIR = flags.DEFINE_string(
  'work_dir',
  '/tmp/flexjax_01',
  'Holds checkpoint and offloaded weights (8 GB).',
)
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')

_SMALL = ['--model=opt-125m', '--dtype=float32', '--batch_size=16']
_LARGE = ['--model=opt-1.3b', '--dtype=bfloat16']
_SHAPE = ['--prompt_len=128', '--gen_len=32']
_BUDGET = ['--device_memory=1GiB', '--host_memory=1GiB']
_ONCE = ['--warmups=0', '--repeats=1']


def _offload(batch, how):
  """A part: so many prompts under the budget, one way of offloading. How they
  are divided into batches is the planner's; more would share weights."""
  return (
    [*_LARGE, *_BUDGET, f'--num_prompts={batch}'],
    ['accelerate', *_LARGE, *_ONCE, f'--batch_size={batch}', *how],
  )


_MAPPED = ['--offload=mmap', '--cache=static']  # weights read where they lie
_FILES = ['--offload=disk_offload']  # accelerate.disk_offload, all of it
PARTS = {
  '125m-float32': (
    [*_SMALL, '--num_batches=1'],
    ['transformers', *_SMALL, '--cache=static'],
  ),
  '1.3b-disk-4': _offload(4, _MAPPED),
  '1.3b-disk-16': _offload(16, _MAPPED),
  '1.3b-disk-64': _offload(64, _MAPPED),
  '1.3b-disk_offload-4': _offload(4, _FILES),
  '1.3b-disk_offload-16': _offload(16, _FILES),
}


def main(argv):
  del argv
  for part in _PARTS.value or PARTS:
    mine, theirs = PARTS[part]
    turns = [
      (run_flexjax([*mine, *_SHAPE]), run_others([*theirs, *_SHAPE]))
      for _ in range(_REPEATS.value)
    ]
    middle = len(turns) // 2
    ours, other = (
      sorted(side, key=lambda r: r['tokens_per_s'])[middle]
      for side in zip(*turns, strict=True)
    )
    fields = {
      'part': part,
      'commit': _COMMIT.value,
      'turns': len(turns),
      'ratio': round(ours['tokens_per_s'] / other['tokens_per_s'], 2),
      **{f'flexjax_{name}': value for name, value in ours.items()},
      **{f'other_{name}': value for name, value in other.items()},
      'flexjax_arguments': ' '.join(mine),
      'other_arguments': ' '.join(theirs),
    }
    common.append(_RESULTS.value, fields)


def run_flexjax(arguments):
  with tempfile.TemporaryDirectory() as folder:
    stats_file = Path(folder) / 'stats.json'
    command = [sys.executable, '-m', 'flexjax', 'bench', '--random_weights']
    command += [*arguments, f'--stats={stats_file}']
    if '--host_memory=1GiB' in arguments:
      command.append(f'--disk_dir={_WORK_DIR.value}/flexjax')
    _, rss = run(command)
    stats = json.loads(stats_file.read_text())
  return {
    'tokens_per_s': round(stats['throughput_tokens_per_s'], 2),
    'prefill_s': round(stats['prefill_seconds'], 2),
    'step_s': round(stats['decode_seconds'] / 31, 4),
    'peak_rss_gib': round(rss, 2),
  }


def run_others(arguments):
  command = [sys.executable, '-W', 'ignore', str(HERE / 'others.py')]
  command += [*arguments, f'--checkpoint={_WORK_DIR.value}/checkpoint']
  command.append(f'--offload_dir={_WORK_DIR.value}/offload')
  out, rss = run(command)
  result = json.loads(out.splitlines()[-1])
  return {
    'tokens_per_s': result['tokens_per_s'],
    'prefill_s': round(result['prefill_seconds'], 2),
    'step_s': result['seconds_per_step'],
    'peak_rss_gib': round(rss, 2),
  }


def run(command):
  """Runs a process; returns its standard output and peak resident GiB."""
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    process = subprocess.Popen(command, stdout=out, stderr=err)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    out.seek(0)
    err.seek(0)
    if process.returncode:
      raise SystemExit(f'{command} failed: {err.read()[-2000:]}')
    return out.read(), usage.ru_maxrss / 2**20


if __name__ == '__main__':
  app.run(main)
