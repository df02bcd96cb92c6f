"""Runs beside their predictions; and what is planned where nothing is said."""

import dataclasses

import numpy as np
import pytest
from conftest import make_checkpoint
from jax.sharding import SingleDeviceSharding

import flexjax
from flexjax import InputError, SamplingParams
from flexjax.hardware import write
from flexjax.runtime import devices
from flexjax.runtime.planner import Planner
from tests.machines import machine

DEVICE, HOST, DISK = (100, 0, 0), (0, 100, 0), (0, 0, 100)
MIXED, HALVES = (30, 30, 40), (40, 30, 30)
VOCABULARY = 96
NEW = 6
SIZES = {
  'hidden_size': 64,
  'num_attention_heads': 2,
  'num_hidden_layers': 3,
  'ffn_dim': 256,
  'vocab_size': VOCABULARY,
  'word_embed_proj_dim': 64,
}
BASE = {
  'dtype': 'float32',
  'batch_size': 2,
  'num_batches': 2,
  'weights': DEVICE,
  'cache': DEVICE,
  'hidden': DEVICE,
  'rounding': 'minmax',
}
PREDICTED = {
  'prefill_seconds',
  'decode_seconds',
  'busy',
  'peak_bytes',
  'link_bytes',
  'throughput_tokens_per_s',
  'binding',
  'planned_bytes',
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('planned')
  make_checkpoint(path, std=0.1, **SIZES)
  return path


@pytest.fixture(scope='module')
def prompts():
  rng = np.random.default_rng(3)
  return [rng.integers(3, VOCABULARY, 8).tolist() for _ in range(8)]


def run(model, prompts, **options):
  """Tokens, figures and the plan of greedily continuing prompts."""
  params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
  with flexjax.load(model, **options) as llm:
    tokens = [o.token_ids for o in llm.generate(prompts, params)]
    return tokens, llm.stats.to_json(), llm._loaded.plan


@pytest.fixture(scope='module')
def expected(model, prompts):
  return run(model, prompts, **BASE)[0]


RUNS = {
  'weights on host': {'weights': HOST},
  'weights on disk, deep': {'weights': DISK, 'prefetch_depth': 5},
  'weights mixed, row': {'weights': MIXED, 'schedule': 'row'},
  'cache on disk': {'cache': DISK, 'weights': HOST},
  'cache mixed, 3 batches': {'cache': MIXED, 'num_batches': 3},
  'all mixed, no overlap': {
    'weights': HALVES,
    'cache': HALVES,
    'hidden': HALVES,
    'overlap': False,
  },
  'all on disk': {'weights': DISK, 'cache': DISK, 'hidden': DISK},
  'all on disk, row, shallow': {
    'weights': DISK,
    'cache': DISK,
    'hidden': DISK,
    'schedule': 'row',
    'prefetch_depth': 1,
  },
  'hidden on disk, one batch': {'hidden': DISK, 'num_batches': 1},
  '4 bits': {'weights': HOST, 'weight_bits': 4, 'cache_bits': 4},
  '4 bits, mixed': {
    'weights': MIXED,
    'cache': MIXED,
    'weight_bits': 4,
    'cache_bits': 4,
    'num_batches': 1,
  },
  '8-bit weights, row, deep': {
    'weights': DISK,
    'weight_bits': 8,
    'schedule': 'row',
    'prefetch_depth': 4,
  },
  '4-bit cache on disk': {'cache': DISK, 'cache_bits': 4},
  'attention on host': {
    'weights': HOST,
    'cache': HOST,
    'attention': 'host',
  },
  # On a CPU, which may keep wider numbers than a layer hands out.
  'bfloat16, cache on host': {'cache': HOST, 'dtype': 'bfloat16'},
  'bfloat16, cache on disk': {'cache': DISK, 'dtype': 'bfloat16'},
  'float16, all on disk': {
    'weights': DISK,
    'cache': DISK,
    'hidden': DISK,
    'dtype': 'float16',
  },
}


@pytest.mark.parametrize('case', RUNS.values(), ids=RUNS)
def test_bytes_are_as_predicted(model, prompts, tmp_path, case):
  options = {**BASE, **case}
  whole = prompts[: options['batch_size'] * options['num_batches']]
  _, stats, plan = run(model, whole, disk_dir=tmp_path, **options)
  check_bytes(stats, plan, {'device'} if has_disk(case, 'cache') else {})


def check_bytes(stats, plan, about):
  """Predicted and reported are equal; in tiers `about` there may be less."""
  predicted = stats['predicted']
  assert set(predicted) == PREDICTED
  assert predicted['link_bytes'] == stats['link_bytes']
  for tier, size in stats['peak_bytes'].items():
    most = 1.1 if tier in about else 1
    assert size <= predicted['peak_bytes'][tier] <= most * size, tier
    assert predicted['planned_bytes'][tier] >= size, tier
  assert predicted['planned_bytes'] == plan.peak
  assert set(predicted['busy']) == {'prefill', 'decode'}


def has_disk(case, *names):
  """Whether some of such tensors are on disk in a case."""
  return any(case.get(name, DEVICE)[2] for name in names)


@pytest.mark.parametrize('case', RUNS.values(), ids=RUNS)
def test_pinned_memory_apart(model, prompts, tmp_path, monkeypatch, case):
  """As on an accelerator: what is on the host or on disk crosses a link, what
  a CPU attends to lies in a third memory, rows are padded and sent."""
  options = {**BASE, **case, 'disk_dir': tmp_path / 'weights'}
  whole = prompts[: options['batch_size'] * options['num_batches']]
  tokens, _, near = run(model, whole, **options)
  apart = two_memories(tmp_path, monkeypatch)
  again, stats, plan = run(model, whole, hardware=apart, **options)
  if options['dtype'] == 'float32':  # else caches are other numbers on a CPU
    assert again == tokens
  assert near.problem.unified
  assert not plan.problem.unified
  # A write to disk may have ended before the next one.
  disk = has_disk(case, 'hidden', 'cache')
  check_bytes(stats, plan, {'host'} if disk else {})


def two_memories(tmp_path, monkeypatch):
  """Gives a CPU pinned memory of its own; returns a record of that."""
  here = devices.machine()
  (cpu,) = here.cpu.device_set
  pinned = SingleDeviceSharding(cpu, memory_kind='pinned_host')
  there = dataclasses.replace(here, unified=False, pinned=pinned)
  monkeypatch.setattr(devices, 'machine', lambda: there)
  record = dataclasses.replace(machine(unified=False), platform=here.platform)
  write(tmp_path / 'record.json', record)
  return tmp_path / 'record.json'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_cache_on_disk_gets_what_it_holds(model, prompts, tmp_path, dtype):
  options = {**BASE, 'cache': DISK, 'dtype': dtype}
  _, stats, plan = run(model, prompts[:4], disk_dir=tmp_path, **options)
  held = sum(plan.problem.sizes('cache').values())
  assert stats['link_bytes']['host_to_disk'] == held
  rows = 2 * 4 * (8 + NEW - 1) * SIZES['hidden_size']  # keys, values
  itemsize = 4 if dtype == 'float16' else plan.problem.cache_itemsize
  assert held == SIZES['num_hidden_layers'] * rows * itemsize


def test_bytes_of_several_blocks(model, prompts, tmp_path):
  options = {**BASE, 'weights': HOST, 'cache': DISK, 'hidden': HOST}
  _, stats, _ = run(model, prompts, disk_dir=tmp_path, **options)
  one = run(model, prompts[:4], disk_dir=tmp_path, **options)[1]
  assert stats['predicted']['link_bytes'] == stats['link_bytes']
  for link, count in one['link_bytes'].items():
    assert stats['link_bytes'][link] == 2 * count
  assert stats['predicted']['peak_bytes'] == one['predicted']['peak_bytes']
  for name in ('prefill_seconds', 'decode_seconds'):
    assert stats['predicted'][name] == pytest.approx(2 * one['predicted'][name])


def test_one_token_and_scores_are_predicted(model, prompts):
  with flexjax.load(model, **BASE | {'weights': HOST}) as llm:
    llm.generate(prompts[:4], SamplingParams(max_new_tokens=1))
    one = llm.stats.to_json()
    llm.score(prompts[:4])
    scored = llm.stats.to_json()
  for stats in (one, scored):
    predicted = stats['predicted']
    assert set(predicted['busy']) == {'prefill'}
    assert predicted['decode_seconds'] == 0
    assert predicted['link_bytes'] == stats['link_bytes']
    assert predicted['peak_bytes'] == stats['peak_bytes']
  assert one['predicted']['throughput_tokens_per_s'] > 0


# What is planned where nothing is said.

GIVEN = {
  'nothing': {},
  'weights': {'weights': HOST},
  'cache': {'cache': (50, 50, 0)},
  'batch_size': {'batch_size': 3},
  'num_batches': {'num_batches': 2},
  'row': {'schedule': 'row', 'prefetch_depth': 1},
  'attention': {'attention': 'host'},
  'little memory': {'device_memory': '3MB', 'host_memory': '3MB'},
  'bits': {'weight_bits': 16, 'cache_bits': 16, 'allow_lossy': True},
}


@pytest.mark.parametrize('given', GIVEN.values(), ids=GIVEN)
def test_plans_keep_flags_and_change_no_token(
  model, prompts, expected, tmp_path, given
):
  tokens, stats, plan = run(
    model, prompts, dtype='float32', disk_dir=tmp_path, **given
  )
  assert tokens == expected
  work = plan.problem.work
  for name, value in given.items():
    if name in ('weights', 'cache', 'hidden'):
      assert tuple(getattr(plan.policy, name)) == value
    elif name in ('batch_size', 'num_batches'):
      assert getattr(work, name) == value
    elif hasattr(plan.policy, name):
      assert getattr(plan.policy, name) == value
  assert work.batch_size * (work.num_batches - 1) < len(prompts)
  assert set(stats['predicted']) == PREDICTED
  for tier, size in stats['peak_bytes'].items():
    assert size <= plan.peak[tier] <= plan.problem.budgets[tier]


def test_other_prompts_are_planned_around_the_weights(model, prompts):
  params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
  with flexjax.load(model, dtype='float32', weights=(50, 50, 0)) as llm:
    llm.generate(prompts[:1], params)
    first = llm._loaded.plan
    loaded = llm._loaded.store
    llm.generate(prompts * 2, params)
    assert llm._loaded.store is loaded
    again = llm._loaded.plan
  assert again.placement['weights'] == first.placement['weights']
  assert again.problem.work.batch_size > first.problem.work.batch_size


def test_the_same_prompts_are_planned_once(model, prompts, monkeypatch):
  """Else weights that are loaded may lead to another block, to compile for."""
  seen = []
  choose = Planner.choose

  def count(self, request, **given):
    seen.append(request)
    return choose(self, request, **given)

  monkeypatch.setattr(Planner, 'choose', count)
  params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
  with flexjax.load(model, dtype='float32', device_memory='1MiB') as llm:
    llm.warm_up(prompts, params)
    compiled = llm.stats.compilations
    llm.generate(prompts, params)
    assert llm.stats.compilations == compiled
  assert len(seen) == 1


def test_latency_bounds_the_predicted_block(model, prompts, tmp_path):
  """On a machine whose block takes the longer the larger it is."""
  params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
  write(tmp_path / 'slow.json', machine(unified=True, flops=1e7, dispatch=1e-6))
  options = {'dtype': 'float32', 'hardware': tmp_path / 'slow.json'}
  seconds = {}
  for bound in (None, 0.75):
    latency = bound and bound * seconds[None]
    with flexjax.load(model, max_latency=latency, **options) as llm:
      llm.generate(prompts, params)
      seconds[bound] = llm._loaded.choice.prediction.seconds
  assert seconds[0.75] <= 0.75 * seconds[None]


def test_a_given_record_is_planned_by(model, prompts, tmp_path):
  slow = machine(unified=True, flops=1e6, bandwidth=1e6)
  write(tmp_path / 'slow.json', slow)
  options = {'dtype': 'float32', 'hardware': tmp_path / 'slow.json'}
  _, stats, _ = run(model, prompts, **options)
  usual = run(model, prompts, dtype='float32')[1]
  assert (
    stats['predicted']['decode_seconds']
    > 100 * usual['predicted']['decode_seconds']
  )


REFUSED = {
  'no record': ({'hardware': 'nowhere.json'}, r"hardware.*'nowhere.json'"),
  'latency': ({'max_latency': 0}, r'max_latency.*positive.*0'),
  'too short': ({'max_latency': 1e-9}, r'max_latency=1e-09.*smallest.* s'),
  'batch_size': ({'batch_size': 0}, r'batch_size.*1, got 0'),
  'num_batches': ({'num_batches': -1}, r'num_batches.*1, got -1'),
  'attention': ({'attention': 'disk'}, r"attention.*'disk'"),
  'device': ({'device_memory': '1KB'}, r'short by .*device'),
}


@pytest.mark.parametrize('case', REFUSED.values(), ids=REFUSED)
def test_refused(model, prompts, case):
  options, message = case
  with (
    pytest.raises(InputError, match=message),
    flexjax.load(model, dtype='float32', **options) as llm,
  ):
    llm.generate(prompts)
