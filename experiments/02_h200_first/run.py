"""Does the engine run on an accelerator, do copies hide, is memory kept?

Runs `flexjax bench` for each row in a fresh process and appends its figures
to results.csv. `--rows` picks rows by name.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

_ROWS = flags.DEFINE_list('rows', None, 'Rows to run; default all.')
_RESULTS = flags.DEFINE_string(
  'results', str(Path(__file__).with_name('results.csv')), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_TIMEOUT = flags.DEFINE_integer('timeout', 400, 'Seconds for one row.')

LINK_BYTES_PER_S = 54e9  # a bare loop's rate over this link
_16 = ['--device_memory=16GiB', '--host_memory=110GiB', '--prompt_len=512']
_16 += ['--gen_len=32', '--random_weights', '--dtype=bfloat16']
HOST = ['--weights=0,100,0', '--cache=0,100,0', '--hidden=100,0,0']
DEVICE = ['--weights=100,0,0', '--cache=100,0,0', '--hidden=100,0,0']
ROWS = {
  '1.3b-device-16x1': ['--model=opt-1.3b', *DEVICE, '--batch_size=16'],
  '6.7b-device-8x1': ['--model=opt-6.7b', *DEVICE, '--batch_size=8'],
  '6.7b-host-48x2': [
    '--model=opt-6.7b', *HOST, '--batch_size=48', '--num_batches=2'
  ],
  '6.7b-host-48x2-no-overlap': [
    '--model=opt-6.7b', *HOST, '--batch_size=48', '--num_batches=2',
    '--nooverlap',
  ],
  '6.7b-cpu-attention-24x2': [
    '--model=opt-6.7b', *HOST, '--batch_size=24', '--num_batches=2',
    '--attention=host',
  ],
  '30b-host-24x2': [
    '--model=opt-30b', *HOST, '--batch_size=24', '--num_batches=2'
  ],
}  # fmt: skip


def main(argv):
  del argv
  for name in _ROWS.value or ROWS:
    record = measure(name, [*ROWS[name], *_16])
    print(json.dumps(record), flush=True)
    path = Path(_RESULTS.value)
    new = not path.exists()
    with open(path, 'a', newline='') as f:
      writer = csv.DictWriter(f, record)
      if new:
        writer.writeheader()
      writer.writerow(record)


def measure(name, arguments):
  """Runs one row; returns its record, with the link's bound beside it."""
  with tempfile.TemporaryDirectory() as folder:
    stats_file = Path(folder) / 'stats.json'
    command = [sys.executable, '-m', 'flexjax', 'bench', *arguments]
    done = subprocess.run(
      [*command, f'--stats={stats_file}'],
      capture_output=True,
      text=True,
      timeout=_TIMEOUT.value,
      check=False,
    )
    if done.returncode:
      sys.stderr.write(done.stderr[-2000:])
      raise SystemExit(f'{name} failed with {done.returncode}')
    stats = json.loads(stats_file.read_text())
  down = stats['link_bytes']['host_to_device']
  steps = 32
  return {
    'row': name,
    'commit': _COMMIT.value,
    'tokens_per_s': round(stats['throughput_tokens_per_s'], 2),
    'prefill_s': round(stats['prefill_seconds'], 3),
    'decode_step_s': round(stats['decode_seconds'] / (steps - 1), 4),
    'link_bound_step_s': round(down / steps / LINK_BYTES_PER_S, 4),
    'load_s': round(stats['load_seconds'], 1),
    'peak_device_gib': round(stats['peak_bytes']['device'] / 2**30, 2),
    'allocator_peak_gib': round(
      (stats['allocator_peak_bytes'] or 0) / 2**30, 2
    ),
    'peak_host_gib': round(stats['peak_bytes']['host'] / 2**30, 2),
    'host_to_device_gb': round(down / 1e9, 2),
    'device_to_host_gb': round(stats['link_bytes']['device_to_host'] / 1e9, 2),
    'link_busy': round(stats['link_busy_fraction'], 3),
    'compilations': stats['compilations'],
    'arguments': ' '.join(arguments),
  }


if __name__ == '__main__':
  app.run(main)
