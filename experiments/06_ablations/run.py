"""What is each of the engine's ideas worth (FlexGen, section 6.3)?

The planner's policy, the same without overlap, a policy without a search, and
the planner's best under a constraint. `flexjax bench` in a fresh process for
every row, one block each; equal policies are measured once. Rows go to
results.csv.
"""

import subprocess
from pathlib import Path

from absl import app, flags

from experiments import common

HERE = Path(__file__).parent
_MACHINE = flags.DEFINE_enum('machine', 'cpu', ['cpu', 'h200'], 'Which set.')
_MODELS = flags.DEFINE_list('models', None, "Models; default the machine's.")
_ROWS = flags.DEFINE_list('rows', None, 'Rows of it; default all.')
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_HARDWARE = flags.DEFINE_string('hardware', None, "The machine's record.")
_DISK = flags.DEFINE_string('disk_dir', '.ablations', 'For the CPU.')
_PROMPTS = flags.DEFINE_integer('num_prompts', None, 'Default: by machine.')
_BUDGETS = flags.DEFINE_list('budgets', None, 'Device and host memory.')
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_TIMEOUT = flags.DEFINE_integer('timeout', 550, 'Seconds for one row.')

MODELS = {'h200': ['opt-6.7b', 'opt-30b'], 'cpu': ['opt-350m']}
DEVICE = {'opt-6.7b': '8GiB'}  # else all of it is there, and nothing streams
PROMPTS = {'h200': 192, 'cpu': 64}
# Without a search: a small block, nothing in device memory that can stream.
NAIVE = {
  'h200': [*common.HOST, '--attention=device'],
  'cpu': [
    '--weights=0,0,100', '--cache=0,0,100', '--hidden=100,0,0',
  ],
}  # fmt: skip
NAIVE_BLOCK = ['--batch_size=16', '--num_batches=1']
# Row -> what the planner is told, what the run is told on top of its plan.
ROWS: dict[str, tuple[list[str], list[str]]] = {
  'all': ([], []),
  'no-overlap': ([], ['--nooverlap']),
  'row-order': (['--schedule=row'], ['--schedule=row']),
  'device-attention': (['--attention=device'], []),
  'host-attention': (['--attention=host'], []),
  'four-bits': (['--allow_lossy'], ['--rounding=minmax']),
}
NAMES = ['all', 'no-overlap', 'no-search', *list(ROWS)[2:]]
_SHAPES = {
  'h200': common.SHAPE,
  'cpu': [
    '--prompt_len=64', '--gen_len=16', '--dtype=float32',
    '--device_memory=800MiB', '--host_memory=300MiB',
  ],
}  # fmt: skip


def shape(model: str) -> list[str]:
  """Flags of every run of a model."""
  machine = _MACHINE.value
  arguments = list(_SHAPES[machine])
  if model != 'bundled':
    arguments += [f'--model={model}', '--random_weights']
  if model in DEVICE:
    arguments.append(f'--device_memory={DEVICE[model]}')
  if _BUDGETS.value:
    device, host = _BUDGETS.value
    arguments += [f'--device_memory={device}', f'--host_memory={host}']
  if machine == 'cpu':
    arguments.append(f'--disk_dir={_DISK.value}/{model}')
  if _HARDWARE.value:
    arguments.append(f'--hardware={_HARDWARE.value}')
  return arguments


def policy(row: str, fixed: list[str], prompts: int) -> list[str]:
  """Flags of a row's policy: the planner's, but for `no-search`."""
  if row == 'no-search':
    return [*NAIVE_BLOCK, *NAIVE[_MACHINE.value]]
  told, added = ROWS[row]
  choice = common.planned([*fixed, *told, f'--num_prompts={prompts}'])
  return [*choice['flags'].split(), *added]


def main(argv):
  del argv
  machine = _MACHINE.value
  names = [n for n in NAMES if machine == 'h200' or n[-9:] != 'attention']
  prompts = _PROMPTS.value or PROMPTS[machine]
  for model in _MODELS.value or MODELS[machine]:
    measured: dict[tuple[str, ...], tuple[dict, float]] = {}
    for row in _ROWS.value or names:
      fields: dict = {'machine': machine, 'model': model}
      fixed = shape(model)
      try:
        arguments = [*fixed, *policy(row, fixed, prompts)]
        key = tuple(arguments)
        if key not in measured:
          gflops = common.cpu_gflops()
          stats = common.bench(arguments, _TIMEOUT.value)
          measured[key] = stats, min(gflops, common.cpu_gflops())
      except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f'{model} {row} failed: {error}', flush=True)
        continue
      stats, fields['cpu_gflops'] = measured[key]
      fields |= common.compare(row, _COMMIT.value, arguments, stats)
      common.append(_RESULTS.value, fields)


if __name__ == '__main__':
  app.run(main)
