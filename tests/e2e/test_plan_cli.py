"""flexjax plan: what it says of models and machines that are not there."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from flexjax.models import presets
from tests.commands import refuses, start

CONFIGS = Path(__file__).parents[2] / 'configs' / 'hardware'
T4 = CONFIGS / 't4.json'
TIERS = ('device', 'host', 'disk')


@pytest.fixture
def plan(flexjax, tmp_path):
  """Returns a function: what a plan is, as --stats has it."""

  def run(model, *argv, hardware=T4):
    stats = tmp_path / 'stats.json'
    done = flexjax(
      'plan',
      f'--model={model}',
      f'--hardware={hardware}',
      f'--stats={stats}',
      *argv,
    )
    assert done.code == 0, done.stderr
    assert done.stderr == ''
    fields = json.loads(stats.read_text())
    check(fields)
    assert fields['flags'] in done.stdout.splitlines()
    return fields

  return run


def check(fields):
  """What holds of every plan."""
  predicted = fields['predicted']
  assert fields['batch_size'] >= 1
  assert fields['num_batches'] >= 1
  for tier in TIERS:
    held = predicted['peak_bytes'][tier]
    assert 0 <= held <= fields['planned_bytes'][tier]
    assert fields['planned_bytes'][tier] <= fields['budget_bytes'][tier]
  assert predicted['prefill_seconds'] > 0
  assert 0 < predicted['throughput_tokens_per_s'] < math.inf
  for phase, busy in predicted['busy'].items():
    assert max(busy, key=busy.get) == predicted['binding'][phase]
    assert all(0 <= part < 1.1 for part in busy.values())
  for name, split in fields['placement'].items():
    assert sum(split.values()) == pytest.approx(1) or name == 'cache'


def rate(fields):
  return fields['predicted']['throughput_tokens_per_s']


def seconds(fields):
  predicted = fields['predicted']
  return predicted['prefill_seconds'] + predicted['decode_seconds']


# Models and machines.

PAIRS = {
  'OPT-30B, T4': ('opt-30b', 't4'),
  'OPT-30B, A100': ('opt-30b', 'a100-40gb'),
  'OPT-6.7B, RTX 3090': ('opt-6.7b', 'rtx3090'),
  'OPT-125M, TPU v5e': ('opt-125m', 'tpu-v5e'),
}


@pytest.mark.parametrize('pair', PAIRS.values(), ids=PAIRS)
def test_plans_can_be_pasted_back(plan, pair):
  model, name = pair
  hardware = CONFIGS / f'{name}.json'
  first = plan(model, hardware=hardware)
  again = plan(model, *first['flags'].split(), hardware=hardware)
  assert again['flags'] == first['flags']
  assert rate(again) == pytest.approx(rate(first), rel=0.01)


def test_all_flags_of_a_plan_are_printed(plan):
  given = (
    '--schedule=row',
    '--prefetch_depth=3',
    '--nooverlap',
    '--weight_bits=4',
    '--group_size=32',
    '--batch_size=3',
    '--num_batches=2',
  )
  first = plan('opt-1.3b', *given)
  again = plan('opt-1.3b', *first['flags'].split())
  assert again['predicted'] == first['predicted']
  assert again['planned_bytes'] == first['planned_bytes']


def test_every_preset_has_a_plan_or_a_reason(flexjax):
  for model in presets.NAMES:
    done = flexjax(
      'plan', f'--model={model}', f'--hardware={T4}', '--num_prompts=4'
    )
    assert done.code == 0, (model, done.stderr)


def test_loss_only_where_it_is_allowed(plan):
  exact = plan('opt-175b')
  lossy = plan('opt-175b', '--allow_lossy')
  assert '--weight_bits=16 --cache_bits=16' in exact['flags']
  assert '--weight_bits=4' in lossy['flags']
  assert rate(lossy) > rate(exact)
  kept = plan('opt-6.7b', '--allow_lossy', '--weight_bits=16')
  assert '--weight_bits=16' in kept['flags']
  for one in exact['runners_up']:
    assert '--weight_bits=16 --cache_bits=16' in one['flags']


def test_other_plans_are_no_faster_by_much(plan):
  fields = plan('opt-30b')
  slowly = 'if_dispatching_is_slow'
  rates = [
    one[slowly]['throughput_tokens_per_s'] for one in fields['runners_up']
  ]
  assert rates == sorted(rates, reverse=True)
  assert rates
  assert max(rates) <= fields[slowly]['throughput_tokens_per_s'] * 1.05


# Flags that are given.

GIVEN = {
  'weights': ('--weights=10,90,0',),
  'cache': ('--cache=0,100,0',),
  'hidden': ('--hidden=0,100,0',),
  'batch_size': ('--batch_size=7',),
  'num_batches': ('--num_batches=3',),
  'attention': ('--attention=host',),
  'bits': ('--weight_bits=8', '--cache_bits=4'),
  'several': ('--weights=0,100,0', '--batch_size=5', '--num_batches=2'),
  'order': ('--schedule=row', '--prefetch_depth=3', '--overlap=false'),
}


@pytest.mark.parametrize('given', GIVEN.values(), ids=GIVEN)
def test_flags_that_are_given_are_kept(plan, given):
  fields = plan('opt-13b', *given)
  assert set(given) <= set(fields['flags'].split())


def test_budgets_are_kept(plan):
  fields = plan(
    'opt-6.7b', '--device_memory=4GiB', '--host_memory=30GiB', '--disk_space=0'
  )
  assert fields['budget_bytes'] == {
    'device': 4 * 2**30,
    'host': 30 * 2**30,
    'disk': 0,
  }
  assert fields['planned_bytes']['disk'] == 0


# Odd problems.

ODD = {
  '1 prompt': ('opt-30b', '--num_prompts=1'),
  '1 token': ('opt-30b', '--gen_len=1'),
  '1 prompt, 1 token of 1': (
    'opt-30b',
    '--num_prompts=1',
    '--gen_len=1',
    '--prompt_len=1',
  ),
  '100000 prompts': ('opt-6.7b', '--num_prompts=100000'),
  'a prime number of prompts': ('opt-6.7b', '--num_prompts=101'),
  'prompts of 2000 tokens': ('opt-30b', '--prompt_len=2000'),
  'all of the context': ('opt-1.3b', '--prompt_len=1', '--gen_len=2047'),
  'no disk': ('opt-30b', '--disk_space=0'),
  'tiny host': ('opt-6.7b', '--host_memory=64MiB'),
  'tiny host, no disk': (
    'opt-1.3b',
    '--host_memory=16MiB',
    '--disk_space=0',
  ),
  'tiny device': ('opt-6.7b', '--device_memory=1500MiB'),
  'few prompts, large batches': (
    'opt-1.3b',
    '--num_prompts=2',
    '--batch_size=8',
    '--num_batches=4',
  ),
}


@pytest.mark.parametrize('case', ODD.values(), ids=ODD)
def test_odd_problems_have_plans(plan, case):
  model, *argv = case
  fields = plan(model, *argv)
  decodes = '--gen_len=1' not in argv
  assert ('decode' in fields['predicted']['busy']) == decodes
  if '--num_prompts=1' in argv:
    assert fields['batch_size'] == fields['num_batches'] == 1


SHORT = {
  'device': (
    ('opt-1.3b', '--device_memory=100MB'),
    r'needs device .* of 95.37 MiB \(short by [\d.]+ MiB\).*'
    r'enough would be [\d.]+ MiB of device_memory',
  ),
  'host, no disk': (
    ('opt-30b', '--host_memory=8GiB', '--disk_space=0'),
    r'short by [\d.]+ GiB\).*a disk \(--disk_space\) would',
  ),
  'nowhere': (
    (
      'opt-175b',
      '--disk_space=1GB',
      '--host_memory=1GiB',
      '--batch_size=1',
      '--num_batches=1',
    ),
    r'\(short by 3\d\d[.\d]+ GiB\)',
  ),
  'split': (
    ('opt-30b', '--weights=100,0,0'),
    r'device [\d.]+ GiB of [\d.]+ GiB \(short by [\d.]+ GiB\).*--weights=.*'
    r'would fit',
  ),
  'batch': (
    ('opt-1.3b', '--batch_size=1500', '--num_batches=1'),
    r'short by .*--batch_size=\d+ .*would fit',
  ),
}


@pytest.mark.parametrize('case', SHORT.values(), ids=SHORT)
def test_what_cannot_fit_is_one_line_of_numbers(flexjax, case):
  (model, *argv), expected = case
  done = flexjax('plan', f'--model={model}', f'--hardware={T4}', *argv)
  refuses(done, expected)


def test_a_disk_is_no_advice_where_nothing_is_known_of_one(flexjax):
  record = f'--hardware={CONFIGS}/tpu-v5e.json'
  done = flexjax('plan', '--model=opt-30b', record)
  refuses(done, r'enough would be [\d.]+ GiB of device_memory')
  assert '--disk' not in done.stderr
  done = flexjax('plan', '--model=opt-1.3b', record, '--weights=0,0,100')
  refuses(done, r'there is no disk for what is to be on disk$')


def test_a_refusal_is_of_what_was_asked_for(flexjax):
  """Not of attention on the host, where that was but a possibility."""
  short = ('--model=opt-30b', f'--hardware={T4}', '--host_memory=1GiB')
  short += ('--disk_space=1GB', '--batch_size=8')
  done = flexjax('plan', *short)
  refuses(done, 'short by')
  assert done.stderr == flexjax('plan', *short, '--attention=device').stderr


# Latency.


def test_latency_bounds_a_block(plan):
  free = plan('opt-13b')
  for part in (0.9, 0.6):
    bound = part * seconds(free)
    fields = plan('opt-13b', f'--max_latency={bound}')
    assert seconds(fields) <= bound
    assert rate(fields) <= rate(free) * 1.03


def test_too_short_a_latency_says_what_is_possible(flexjax, plan):
  done = flexjax(
    'plan', '--model=opt-6.7b', f'--hardware={T4}', '--max_latency=0.01'
  )
  refuses(done, r'--max_latency=0.01 s; .* [\d.]+ s')
  least = float(re.findall(r'([\d.]+) s$', done.stderr.strip())[0])
  fields = plan('opt-6.7b', f'--max_latency={1.01 * least}')
  assert seconds(fields) <= 1.01 * least


def test_pareto_is_monotone(plan):
  fields = plan('opt-6.7b', '--pareto')
  curve = fields['pareto']
  assert len(curve) > 2
  for one, other in itertools.pairwise(curve):
    assert seconds(one) < seconds(other)
    assert rate(one) < rate(other)
  assert rate(curve[-1]) == pytest.approx(rate(fields), rel=0.03)


# Files.


def test_a_trace_holds_every_compute(plan, tmp_path):
  trace = tmp_path / 'trace.json'
  fields = plan(
    'opt-1.3b',
    '--weights=50,50,0',
    '--gen_len=4',
    '--batch_size=2',
    '--num_batches=3',
    f'--trace={trace}',
  )
  events = json.loads(trace.read_text())['traceEvents']
  tracks = {
    (e['pid'], e['tid']): e['args']['name']
    for e in events
    if e['ph'] == 'M' and e['name'] == 'thread_name'
  }
  spans = [e for e in events if e['ph'] == 'X']
  assert all(e['dur'] >= 0 and e['ts'] >= 0 for e in spans)
  names = {tracks[e['pid'], e['tid']] for e in spans}
  device = next(name for name in names if 'device' in name and 'to' not in name)
  cells = [
    tuple(e['args'][n] for n in 'ijk')
    for e in spans
    if tracks[e['pid'], e['tid']] == device
    and e['name'].split()[0] in ('embed', 'attention', 'mlp', 'head')
  ]
  layers = 2 + 2 * presets.preset('opt-1.3b').num_layers
  assert sorted(cells) == list(
    itertools.product(range(4), range(layers), range(3))
  )
  end = max(e['ts'] + e['dur'] for e in spans) / 1e6
  assert end == pytest.approx(seconds(fields), rel=0.02)


# Bad values.

BAD = {
  'hardware': ('--hardware=nowhere.json', r"hardware record.*'nowhere.json'"),
  'hardware, no JSON': (
    f'--hardware={__file__}',
    r'hardware record.*\.py. is not JSON',
  ),
  'max_latency': ('--max_latency=0', 'max_latency must be positive'),
  'max_latency, below': ('--max_latency=-3', 'max_latency must be positive'),
  'max_latency, nan': ('--max_latency=nan', 'max_latency must be positive'),
  'max_latency, text': ('--max_latency=soon', 'max_latency.*soon'),
  'prompt_len': ('--prompt_len=0', 'prompt_len must be at least 1, got 0'),
  'gen_len': ('--gen_len=0', 'gen_len must be at least 1, got 0'),
  'num_prompts': ('--num_prompts=0', 'num_prompts must be at least 1, got 0'),
  'batch_size': ('--batch_size=0', 'batch_size must be at least 1, got 0'),
  'num_batches': ('--num_batches=-1', 'num_batches must be at least 1'),
  'context': ('--prompt_len=2040', '2040 prompt tokens.*context of 2048'),
  'disk_space': ('--disk_space=lots', "disk_space: 'lots' is not a size"),
  'device_memory': ('--device_memory=0', 'positive'),
  'host_memory': ('--host_memory=1XB', "host_memory: '1XB' is not a size"),
  'attention': ('--attention=disk', "attention.*'disk'"),
  'weights': ('--weights=50,20,0', r'--weights: .*70'),
  'weight_bits': ('--weight_bits=5', "weight_bits.*'5'"),
  'cache_bits': ('--cache_bits=x', "cache_bits.*'x'"),
  'group_size': ('--group_size=48', 'group_size.*48'),
  'dtype': ('--dtype=int8', "dtype.*'int8'"),
  'model': ('--model=opt-1000b', 'opt-1000b'),
  'trace': ('--trace=/no/such/folder/t.json', "--trace '/no/such/folder"),
  'stats': ('--stats=/no/such/folder/s.json', "--stats '/no/such/folder"),
  'not a flag': ('opt-30b', "'opt-30b' is not a flag"),
}


@pytest.mark.parametrize('case', BAD.values(), ids=BAD)
def test_bad_values_are_one_line(flexjax, case):
  flag, expected = case
  done = flexjax('plan', '--model=opt-125m', f'--hardware={T4}', flag)
  refuses(done, expected)


def test_of_this_machine_without_a_record(flexjax, tmp_path):
  """The bundled model, here."""
  stats = tmp_path / 'stats.json'
  done = flexjax('plan', f'--stats={stats}', '--prompt_len=16')
  assert done.code == 0, done.stderr
  check(json.loads(stats.read_text()))


def test_reader_that_has_gone_is_no_error():
  with start('plan', '--model=opt-125m', f'--hardware={T4}') as process:
    process.stdout.close()
    assert process.stderr.read() == ''
  assert process.returncode == 0
