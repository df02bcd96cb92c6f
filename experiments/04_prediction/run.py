"""Does a run take what the plan said, in seconds and in bytes?

Runs `flexjax bench` for each policy in a fresh process and appends what was
predicted and what was measured to results.csv. `--machine` names the set of
policies; `--hardware` is the machine's record, by `flexjax calibrate`.
"""

from pathlib import Path

from absl import app, flags

from experiments import common

HERE = Path(__file__).parent
_MACHINE = flags.DEFINE_enum('machine', 'cpu', ['cpu', 'h200'], 'Which set.')
_ROWS = flags.DEFINE_list('rows', None, 'Rows of it; default all.')
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_HARDWARE = flags.DEFINE_string('hardware', None, "The machine's record.")
_DISK = flags.DEFINE_string('disk_dir', '.prediction', 'For rows with a disk.')
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_TIMEOUT = flags.DEFINE_integer('timeout', 400, 'Seconds for one row.')


def policy(model, block, weights, cache, *more):
  """Flags of a policy: `block` like 48x2, splits as percentages."""
  size, batches = block.split('x')
  return [
    f'--model=opt-{model}',
    f'--batch_size={size}',
    f'--num_batches={batches}',
    f'--weights={weights}',
    f'--cache={cache}',
    '--hidden=100,0,0',
    '--attention=device',
    *more,
  ]


FOUR = ['--weight_bits=4', '--cache_bits=4', '--rounding=minmax']
HERE_ALL, THERE_ALL, ON_DISK = '100,0,0', '0,100,0', '0,0,100'
H200 = {
  '1.3b-device-16x1': policy('1.3b', '16x1', HERE_ALL, HERE_ALL),
  '1.3b-streamed-64x1': policy('1.3b', '64x1', THERE_ALL, HERE_ALL),
  '1.3b-host-96x4': policy('1.3b', '96x4', THERE_ALL, THERE_ALL),
  '6.7b-device-8x1': policy('6.7b', '8x1', HERE_ALL, HERE_ALL),
  '6.7b-streamed-24x1': policy('6.7b', '24x1', THERE_ALL, HERE_ALL),
  '6.7b-half-16x2': policy('6.7b', '16x2', '50,50,0', '50,50,0'),
  '6.7b-host-48x2': policy('6.7b', '48x2', THERE_ALL, THERE_ALL),
  '6.7b-host-48x2-no-overlap': policy(
    '6.7b', '48x2', THERE_ALL, THERE_ALL, '--nooverlap'
  ),
  '6.7b-row-20x2': policy(
    '6.7b', '20x2', THERE_ALL, HERE_ALL, '--schedule=row'
  ),
  '6.7b-host-48x2-4': policy('6.7b', '48x2', THERE_ALL, THERE_ALL, *FOUR),
  '6.7b-device-72x1-4': policy('6.7b', '72x1', HERE_ALL, HERE_ALL, *FOUR),
  '30b-host-48x4-4': policy('30b', '48x4', THERE_ALL, THERE_ALL, *FOUR),
}
CPU = {
  '125m-device-4x1': policy('125m', '4x1', HERE_ALL, HERE_ALL),
  '125m-device-32x1': policy('125m', '32x1', HERE_ALL, HERE_ALL),
  '125m-device-16x4': policy('125m', '16x4', HERE_ALL, HERE_ALL),
  '125m-disk-16x1': policy('125m', '16x1', ON_DISK, HERE_ALL),
  '350m-device-8x1': policy('350m', '8x1', HERE_ALL, HERE_ALL),
  '350m-disk-8x2': policy('350m', '8x2', ON_DISK, HERE_ALL),
  '350m-disk-8x2-no-overlap': policy(
    '350m', '8x2', ON_DISK, HERE_ALL, '--nooverlap'
  ),
  '350m-row-8x2': policy('350m', '8x2', ON_DISK, HERE_ALL, '--schedule=row'),
  '350m-cache-disk-8x2': policy('350m', '8x2', HERE_ALL, ON_DISK),
  '1.3b-device-4x1': policy('1.3b', '4x1', HERE_ALL, HERE_ALL),
  '1.3b-disk-4x1': policy('1.3b', '4x1', ON_DISK, HERE_ALL),
  '1.3b-disk-8x2': policy('1.3b', '8x2', '30,0,70', HERE_ALL),
}
SHAPES = {
  'h200': common.SHAPE,
  'cpu': [
    '--prompt_len=64', '--gen_len=16', '--random_weights', '--dtype=float32',
    '--device_memory=9GiB', '--host_memory=4GiB',
  ],
}  # fmt: skip


def main(argv):
  del argv
  rows = {'h200': H200, 'cpu': CPU}[_MACHINE.value]
  for name in _ROWS.value or rows:
    arguments = [*rows[name], *SHAPES[_MACHINE.value]]
    if _HARDWARE.value:
      arguments.append(f'--hardware={_HARDWARE.value}')
    if any(flag.endswith((',100', ',70')) for flag in rows[name][3:5]):
      model = name.split('-')[0]
      arguments.append(f'--disk_dir={_DISK.value}/{model}')
    stats = common.bench(arguments, _TIMEOUT.value)
    fields = common.compare(name, _COMMIT.value, arguments, stats)
    fields = {'machine': _MACHINE.value, **fields}
    common.append(_RESULTS.value, fields)


if __name__ == '__main__':
  app.run(main)
