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

ROWS = {
  '1.3b-device-16x1': ['--model=opt-1.3b', *common.DEVICE, '--batch_size=16'],
  '6.7b-device-8x1': ['--model=opt-6.7b', *common.DEVICE, '--batch_size=8'],
  '6.7b-host-48x2': [
    '--model=opt-6.7b', *common.HOST, '--batch_size=48', '--num_batches=2'
  ],
  '6.7b-host-48x2-no-overlap': [
    '--model=opt-6.7b', *common.HOST, '--batch_size=48', '--num_batches=2',
    '--nooverlap',
  ],
  '6.7b-cpu-attention-24x2': [
    '--model=opt-6.7b', *common.HOST, '--batch_size=24', '--num_batches=2',
    '--attention=host',
  ],
  '30b-host-24x2': [
    '--model=opt-30b', *common.HOST, '--batch_size=24', '--num_batches=2'
  ],
}  # fmt: skip


def main(argv):
  del argv
  for name in _ROWS.value or ROWS:
    arguments = [*ROWS[name], *common.SHAPE]
    stats = common.bench(arguments, _TIMEOUT.value)
    fields = common.record(name, _COMMIT.value, arguments, stats)
    common.append(_RESULTS.value, fields)


if __name__ == '__main__':
  app.run(main)
