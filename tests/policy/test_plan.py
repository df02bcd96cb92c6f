"""Policy and budgets -> places, or a refusal whose advice holds."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.config import ModelConfig, Policy, Split, Workload, parse_bytes
from flexjax.errors import InputError
from flexjax.policy import cost
from flexjax.policy.placement import TIERS, total
from flexjax.policy.plan import can_fit, evaluate, fill, resolve
from flexjax.policy.problem import CLASSES, Problem

CONFIG = ModelConfig(
  num_layers=4,
  num_heads=4,
  hidden_size=64,
  ffn_size=256,
  embed_size=64,
  vocab_size=1000,
  max_positions=256,
)
LAYERS = [
  ('embed', (0, 1)),
  *[(kind, (2 + n,)) for n, kind in enumerate(('attention', 'mlp') * 4)],
  ('head', (0, 10)),
]
GROUPS = [256_000, 66_000, *[66_000, 132_000] * 4, 512]
PLENTY = 2**40


def problem(
  *, unified=False, batch_size=4, num_batches=2, gen_len=8, **budgets
):
  return Problem(
    config=CONFIG,
    work=Workload(
      batch_size=batch_size,
      num_batches=num_batches,
      prompt_len=16,
      gen_len=gen_len,
    ),
    layers=LAYERS,
    group_bytes=GROUPS,
    dtype='float32',
    cache_dtype='float32',
    unified=unified,
    budgets={'device': PLENTY, 'host': PLENTY, 'disk': PLENTY, **budgets},
  )


def test_all_is_on_the_device_where_it_fits():
  plan = resolve(problem(), Policy())
  assert set(plan.places.values()) == {'device'}
  assert plan.peak['host'] == plan.peak['disk'] == 0
  held = sum(sum(plan.problem.sizes(name).values()) for name in CLASSES)
  assert held < plan.peak['device'] <= PLENTY


@pytest.mark.parametrize('name', CLASSES)
def test_given_splits_are_kept(name):
  plan = resolve(problem(), Policy(**{name: Split(0, 50, 50)}))
  assert plan.placement[name]['device'] == 0
  assert plan.placement[name]['host'] == pytest.approx(0.5, abs=0.2)
  for other in set(CLASSES) - {name}:
    assert plan.placement[other]['device'] == 1


BUDGETS = st.fixed_dictionaries(
  {
    'device': st.integers(2 * 10**5, 4 * 10**6),
    'host': st.integers(10**5, 3 * 10**6),
    'disk': st.sampled_from([0, 10**5, PLENTY]),
    'unified': st.booleans(),
    'batch_size': st.integers(1, 8),
    'num_batches': st.integers(1, 4),
    'gen_len': st.sampled_from([0, 1, 8]),
  }
)
SPLITS = st.sampled_from(
  [
    None,
    Split(100, 0, 0),
    Split(0, 100, 0),
    Split(20, 40, 40),
    Split(0, 0, 100),
  ]
)
POLICIES = st.builds(
  Policy,
  weights=SPLITS,
  cache=SPLITS,
  hidden=SPLITS,
  prefetch_depth=st.integers(1, 5),
  overlap=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(BUDGETS, POLICIES)
def test_budgets_are_kept_or_the_request_is_refused(budgets, policy):
  p = problem(**budgets)
  try:
    plan = resolve(p, policy)
  except InputError as e:
    message = str(e)
    assert '\n' not in message
    assert all(tier in message for tier in TIERS)
    assert re.search(r'would fit|would be|disk_dir', message)
    return
  sizes = {k: n for name in CLASSES for k, n in p.sizes(name).items()}
  assert set(plan.places) == set(sizes)
  held = total(sizes, plan.places)
  for tier in TIERS:
    assert held[tier] <= plan.peak[tier] <= p.budgets[tier]
  for name in CLASSES:
    if (asked := getattr(policy, name)) is not None:
      assert getattr(plan.policy, name) == asked
    if p.sizes(name):
      assert sum(plan.placement[name].values()) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(BUDGETS, POLICIES)
def test_what_cannot_fit_does_not(budgets, policy):
  p = problem(**budgets)
  if fill(p, policy).fits:
    assert can_fit(p, policy)


def test_a_block_that_is_far_too_large_is_not_filled():
  """Advice comes from the first smaller one that might fit."""
  p = problem(device=2**20, host=2**20, disk=0)
  assert can_fit(p, Policy())
  for batch_size in (10**4, 10**6):
    work = dataclasses.replace(p.work, batch_size=batch_size)
    assert not can_fit(dataclasses.replace(p, work=work), Policy())


@settings(max_examples=25, deadline=None)
@given(BUDGETS, POLICIES)
def test_advice_holds(budgets, policy):
  """What a refusal says would fit, does."""
  try:
    resolve(problem(**budgets), policy)
    return
  except InputError as e:
    message = str(e).rsplit(';', 1)[1]
  if 'would fit' not in message:
    return
  changes = dict(re.findall(r'--(\w+)=([\d.,]+)', message))
  for name in CLASSES:
    if name in changes:
      changes[name] = Split.parse(changes[name], name)
  for name in ('batch_size', 'num_batches'):
    if name in changes:
      budgets = {**budgets, name: int(changes.pop(name))}
  fields = {
    name: getattr(policy, name)
    for name in (*CLASSES, 'prefetch_depth', 'overlap')
  }
  if 'without placement flags' in message:
    fields |= dict.fromkeys(CLASSES)
  resolve(problem(**budgets), Policy(**fields | changes))


def test_least_memory_is_enough():
  """What a refusal says is the least, is enough."""
  with pytest.raises(InputError, match='enough') as refused:
    resolve(problem(device=1000, batch_size=1, num_batches=1), Policy())
  size = re.search(
    r'enough would be ([\d.]+ \w+) of device', str(refused.value)
  )[1]
  least = parse_bytes(size)
  resolve(
    problem(device=round(least * 1.01), batch_size=1, num_batches=1), Policy()
  )


def test_loaded_weights_stay_where_they_are():
  first = resolve(problem(), Policy(weights=Split(0, 50, 50)))
  fixed = {k: t for k, t in first.places.items() if k[0] == 'weights'}
  again = resolve(problem(batch_size=8), Policy(), fixed)
  assert {k: t for k, t in again.places.items() if k in fixed} == fixed
  assert again.placement['weights'] == first.placement['weights']


def test_no_cache_for_one_token_and_for_scores():
  for gen_len in (0, 1):
    p = problem(gen_len=gen_len)
    assert p.sizes('cache') == {}
    assert sum(resolve(p, Policy()).placement['cache'].values()) == 0


def test_host_attention_wants_the_cache_on_the_host():
  plan = resolve(problem(), Policy(attention='host'))
  assert plan.placement['cache'] == {'device': 0, 'host': 1, 'disk': 0}
  with pytest.raises(InputError, match='cache'):
    Policy(attention='host', cache=Split(50, 50, 0))


def test_what_the_cpu_attends_to_lies_beside_a_pool_that_may_double():
  splits = dict.fromkeys(CLASSES, Split(0, 100, 0))
  for unified, beside in (False, 1), (True, 0):
    p = problem(unified=unified)
    policy = Policy(attention='host', **splits)
    pinned = [*p.sizes('weights').values(), *p.sizes('hidden').values()]
    attended = evaluate(p, policy).peak['host']
    alone = evaluate(p, Policy(**splits)).peak['host']
    assert attended == alone + beside * sum(pinned)
    at = {name: {'device': 0, 'host': 1, 'disk': 0} for name in CLASSES}
    assert cost.peak_bytes(p, policy, at, False)['host'] == attended
  scored = problem(gen_len=1)  # leaves no cache for the CPU
  assert not scored.work.cache_len
  host = [
    evaluate(scored, dataclasses.replace(policy, attention=where)).peak['host']
    for where in ('host', 'device')
  ]
  assert host[0] == host[1]


def test_deeper_prefetch_takes_more():
  splits = dict.fromkeys(CLASSES, Split(0, 0, 100))
  peaks = [
    evaluate(problem(), Policy(prefetch_depth=depth, **splits)).peak['device']
    for depth in (1, 2, 5)
  ]
  assert peaks == sorted(set(peaks))
  none = evaluate(problem(), Policy(overlap=False, **splits)).peak['device']
  assert none < peaks[0]
