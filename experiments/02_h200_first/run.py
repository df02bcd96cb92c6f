"""Does the engine run on an accelerator, do copies hide, is memory kept?

Runs `flexjax bench` for each row in a fresh process and appends its figures
to results.csv. `--rows` picks rows by name.
"""

from pathlib import Path

from absl import app, flags

from experiments import common

_ROWS = flags.DEFINE_list('rows', None, 'Rows to run; default all.')
_RESULTS = flags.DEFINE_string(
  'results', str(Path(__file__).with_name('results.csv')), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_TIMEOUT = flags.DEFINE_integer('timeout', 400, 'Seconds for one row.')

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
    arguments = [*ROWS[name], *_16]
    stats = common.bench(arguments, _TIMEOUT.value)
    fields = common.record(name, _COMMIT.value, arguments, stats, steps=32)
    common.append(_RESULTS.value, fields)


if __name__ == '__main__':
  app.run(main)
