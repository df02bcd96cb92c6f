"""flexjax plan: how a model would run, and how fast, before a byte is loaded.

  flexjax plan --model=opt-175b --hardware=configs/hardware/t4.json
  flexjax plan --model=opt-30b --device_memory=16GiB --allow_lossy --pareto

Takes a preset's name, or any model that generate takes; reads no weights.
Flags that say how a model runs are kept, and the rest is planned around them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from absl import flags

from flexjax import atomic
from flexjax.cli import flags as shared
from flexjax.cli import report
from flexjax.config import Policy, format_bytes
from flexjax.policy.placement import TIERS
from flexjax.policy.plan import Plan
from flexjax.runtime import planning as plans
from flexjax.runtime import simulate, timeline
from flexjax.runtime.planner import Choice
from flexjax.runtime.ranking import CAUTION
from flexjax.runtime.simulate import Prediction

FLAGS = flags.FLAGS
_WIDTH = 140  # of tables where there is no terminal
_SLOWLY = 'if_dispatching_is_slow'  # a field: see `Choice.slowly`
_POLICY = (
  'dtype', 'weights', 'cache', 'hidden', 'batch_size', 'num_batches',
  'schedule', 'prefetch_depth', 'overlap', 'attention', 'weight_bits',
  'cache_bits', 'group_size', 'device_memory', 'host_memory', 'disk_dir',
  'allow_lossy', 'hardware', 'disk_space', 'prompt_len', 'gen_len',
  'num_prompts', 'max_latency',
)  # fmt: skip


def define() -> None:
  shared.define_policy()
  flags.DEFINE_integer('prompt_len', 512, 'Tokens in every prompt.')
  flags.DEFINE_integer('gen_len', 32, 'Tokens to generate for every prompt.')
  flags.DEFINE_integer(
    'num_prompts', None, 'Prompts there are. Default: as many as one likes.'
  )
  flags.DEFINE_string(
    'disk_space',
    None,
    'Budget of disk, such as 1TB; 0 for no disk. Default: what the record says '
    '(of this machine: what is free at --disk_dir).',
  )
  flags.DEFINE_bool(
    'pareto', False, 'Print throughput against the latency of a block, too.'
  )
  flags.DEFINE_string(
    'trace',
    None,
    'File for the predicted timeline, a Chrome/Perfetto trace.',
  )
  flags.DEFINE_string('stats', None, 'File for the plan, JSON.')


def run() -> None:
  shared.check_files('trace', 'stats')
  arguments: dict[str, Any] = {name: FLAGS[name].value for name in _POLICY}
  model = FLAGS.model
  with report.calibrating() as arguments['on_progress']:
    choice = plans.plan(model, **arguments)
  console = report.console(_WIDTH)
  show(console, choice)
  curve = plans.pareto(model, **arguments) if FLAGS.pareto else []
  if curve:
    console.print('\nthroughput against the latency of a block')
    console.print(_table([(c.plan, c.prediction) for c in curve]))
  if FLAGS.trace:
    spans = simulate.timeline(choice.plan, choice.hardware)
    timeline.write(FLAGS.trace, spans, 'predicted')
  if FLAGS.stats:
    _write(Path(FLAGS.stats), choice, curve)


def show(console: rich.console.Console, choice: Choice) -> None:
  """Prints a plan, what it is expected to take, and what comes after it."""
  plan, predicted = choice.plan, choice.prediction
  work = plan.problem.work
  console.print(f'on {choice.hardware.name}', markup=False)
  console.print(command_line(plan), soft_wrap=True)
  rate = predicted.throughput_tokens_per_s
  console.print(
    f'\npredicted: {rate:.4g} tokens/s; {work.batch_size * work.num_batches} '
    f'prompts in {_seconds(predicted.seconds)}, prefill '
    f'{_seconds(predicted.prefill_seconds)}, decode '
    f'{_seconds(predicted.decode_seconds)}\n'
  )
  console.print(_resources(predicted))
  console.print()
  console.print(_memory(plan, predicted))
  if choice.runners_up:
    rate = choice.slowly.throughput_tokens_per_s
    console.print(
      f'\nrunners-up, if dispatching took {CAUTION:g} times as long (this plan '
      f'then: {rate:.4g} tokens/s)'
    )
    console.print(_table(choice.runners_up))


def command_line(plan: Plan) -> str:
  """Returns the flags that ask for a plan."""
  policy, work = plan.policy, plan.problem.work
  values: dict[str, Any] = {
    'batch_size': work.batch_size,
    'num_batches': work.num_batches,
    **{name: _split(getattr(policy, name)) for name in plan.placement},
    'attention': policy.attention,
    'weight_bits': policy.weight_bits,
    'cache_bits': policy.cache_bits,
    'dtype': plan.problem.dtype,
  }
  for name in ('schedule', 'prefetch_depth', 'overlap', 'group_size'):
    value = getattr(policy, name)
    if value != getattr(Policy, name):
      values[name] = str(value).lower()
  return ' '.join(f'--{name}={value}' for name, value in values.items())


def _split(split) -> str:
  return ','.join(f'{part:g}' for part in split)


def _resources(predicted: Prediction) -> rich.table.Table:
  """How busy everything is in each phase; what binds is marked."""
  table = rich.table.Table(box=None, pad_edge=False)
  table.add_column('busy')
  for phase in predicted.busy:
    table.add_column(phase, justify='right')
  for name in next(iter(predicted.busy.values())):
    parts = [busy[name] for busy in predicted.busy.values()]
    if not any(parts):
      continue
    cells = (
      f'{100 * part:.0f} %'
      + (' binds' if predicted.binding(phase) == name else '')
      for phase, part in zip(predicted.busy, parts, strict=True)
    )
    table.add_row(name.replace('_', ' '), *cells)
  return table


def _memory(plan: Plan, predicted: Prediction) -> rich.table.Table:
  table = rich.table.Table(box=None, pad_edge=False)
  table.add_column('memory')
  for name in ('holds', 'with computing', 'of'):
    table.add_column(name, justify='right')
  for tier in TIERS:
    budget = plan.problem.budgets[tier]
    if budget:
      sizes = (predicted.peak_bytes[tier], plan.peak[tier], budget)
      table.add_row(tier, *(format_bytes(n) for n in sizes))
  return table


def _table(rows) -> rich.table.Table:
  """A plan a line."""
  table = rich.table.Table(box=None, pad_edge=False)
  for name in ('tokens/s', 'block', 'batches', 'weights', 'cache', 'hidden'):
    table.add_column(name, justify='right')
  for name in ('bits', 'attention', 'prefill bound by', 'decode bound by'):
    table.add_column(name)
  for plan, predicted in rows:
    policy, work = plan.policy, plan.problem.work
    binding = [predicted.binding(phase) for phase in predicted.busy]
    table.add_row(
      f'{predicted.throughput_tokens_per_s:.4g}',
      _seconds(predicted.seconds),
      f'{work.batch_size} x {work.num_batches}',
      *(_split(getattr(policy, c)) for c in ('weights', 'cache', 'hidden')),
      f'{policy.weight_bits}/{policy.cache_bits}',
      policy.attention,
      *(name.replace('_', ' ') for name in binding),
    )
  return table


def _seconds(value: float) -> str:
  return f'{value:.3g} s' if value < 1000 else f'{value:.0f} s'


def to_json(
  plan: Plan, predicted: Prediction, name: str = 'predicted'
) -> Mapping[str, Any]:
  """Returns a plan and its prediction, a field `name`, as plain numbers."""
  work = plan.problem.work
  return {
    'flags': command_line(plan),
    'batch_size': work.batch_size,
    'num_batches': work.num_batches,
    'placement': plan.placement,
    'planned_bytes': plan.peak,
    'budget_bytes': plan.problem.budgets,
    name: predicted.to_json(),
  }


def _write(path: Path, choice: Choice, curve: list[Choice]) -> None:
  fields = {
    'hardware': choice.hardware.name,
    **to_json(choice.plan, choice.prediction),
    _SLOWLY: choice.slowly.to_json(),
    'runners_up': [to_json(*one, _SLOWLY) for one in choice.runners_up],
  }
  if curve:
    fields['pareto'] = [to_json(c.plan, c.prediction) for c in curve]
  atomic.write(path, [json.dumps(fields, indent=2), '\n'])
