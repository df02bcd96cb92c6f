"""The linear program against trying everything, and what the search keeps."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.config import Packing, Policy, Split, Workload
from flexjax.policy import cost
from flexjax.policy.charges import Charges
from flexjax.policy.placement import TIERS
from flexjax.policy.plan import evaluate
from flexjax.policy.problem import CLASSES
from flexjax.policy.program import solve
from flexjax.policy.search import Request, Variant, place, search
from tests.machines import machine
from tests.problems import PLENTY, problem, rate, shares

# A link that counts beside the computing of so small a model.
SLOW = {'link': 2e7, 'drive': 5e6, 'dispatch': 1e-6, 'flops': 1e12}
POLICY = Policy(prefetch_depth=1)
_TASTE = 1e-3  # of the time, which the program may give for a higher tier
STEPS = 3  # of the grid: fractions are thirds


def grid(tiers=TIERS):
  """All fractions of three classes in thirds."""
  points = [
    point
    for point in itertools.product(range(STEPS + 1), repeat=3)
    if sum(point) == STEPS
    and all(n == 0 or t in tiers for n, t in zip(point, TIERS, strict=True))
  ]
  for each in itertools.product(points, repeat=len(CLASSES)):
    parts = (tuple(n / STEPS for n in point) for point in each)
    yield shares(**dict(zip(CLASSES, parts, strict=True)))


def fits(p, policy, at, slack=0.0):
  return all(
    size <= p.budgets[tier] + slack
    for prefill in (True, False)[: 1 + (p.work.gen_len > 1)]
    for tier, size in cost.peak_bytes(p, policy, at, prefill).items()
  )


def block_seconds(p, policy, at, hardware):
  """What the cost model says of a block."""
  charges = Charges(p, hardware)
  together = max if policy.overlap else sum
  first, later = (
    together(cost.step_seconds(charges, policy, at, prefill).values())
    for prefill in (True, False)
  )
  return first + max(0, p.work.gen_len - 1) * later


CASES = {
  # policy, problem, machine
  'plenty of everything': ({}, {}, {}),
  'half of it on the device': ({}, {'device': 1_400_000}, {}),
  'little on the device': ({}, {'device': 1_200_000}, {}),
  'all three tiers': ({}, {'device': 1_200_000, 'host': 900_000}, {}),
  'no disk': ({}, {'device': 1_300_000, 'disk': 0}, {}),
  'no overlap': (
    {'overlap': False},
    {'device': 1_100_000, 'host': 900_000},
    {},
  ),
  'row': ({'schedule': 'row'}, {'device': 1_300_000}, {}),
  'attended on host': (
    {'attention': 'host'},
    {'device': 1_600_000, 'batch_size': 8},
    {},
  ),
  'one token': ({}, {'device': 1_300_000, 'gen_len': 1}, {}),
  'packed': (
    {'weight_bits': 4, 'cache_bits': 4},
    {
      'device': 1_400_000,
      'packing': Packing(4),
      'cache_packing': Packing(4, 32),
    },
    {},
  ),
  'one memory': (
    {},
    {'device': 1_500_000, 'host': 1_200_000, 'unified': True},
    {'unified': True},
  ),
}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_no_point_of_the_grid_is_better(case):
  options, sizes, rates = case
  policy = Policy(**{'prefetch_depth': 1} | options)
  p, hardware = problem(**sizes), machine(**SLOW | rates)
  at_host = shares(cache='host')['cache']
  settled = {'cache': at_host} if policy.attention == 'host' else None
  found = solve(p, policy, hardware, settled=settled)
  assert found is not None
  at, took = found
  for name in CLASSES:
    assert sum(at[name].values()) == pytest.approx(1)
    assert all(part >= 0 for part in at[name].values())
  assert fits(p, policy, at, slack=16)
  assert took == pytest.approx(
    block_seconds(p, policy, at, hardware), rel=_TASTE
  )
  tiers = [t for t in TIERS if p.budgets[t]]
  best = min(
    (
      block_seconds(p, policy, point, hardware)
      for point in grid(tiers)
      if (settled is None or point['cache'] == at_host)
      and fits(p, policy, point)
    ),
    default=None,
  )
  assert best is not None
  assert took <= best * (1 + _TASTE)


@pytest.mark.parametrize('overlap', [True, False])
@pytest.mark.parametrize('unified', [True, False])
@pytest.mark.parametrize('attention', ['device', 'host'])
def test_the_program_agrees_where_all_fits_high_up(
  attention, unified, overlap, monkeypatch
):
  p = problem(unified=unified)
  policy = Policy(prefetch_depth=1, attention=attention, overlap=overlap)
  hardware = machine(**SLOW, unified=unified)
  host = {'cache': {'device': 0.0, 'host': 1.0, 'disk': 0.0}}
  settled = host if attention == 'host' else {}
  at, seconds = solve(p, policy, hardware, settled=settled)
  monkeypatch.setattr('flexjax.policy.program._seconds', lambda *args: None)
  by_program, expected = solve(p, policy, hardware, settled=settled)
  assert seconds == pytest.approx(expected, rel=1e-6)
  for name in CLASSES:
    assert at[name] == pytest.approx(by_program[name], abs=1e-6)


def test_time_being_equal_all_is_on_the_device():
  hardware = machine(**SLOW)
  # Rows that go to the device cost it time, and those that go elsewhere none.
  free = dict.fromkeys(hardware.row_write, rate(1e15))
  hardware = dataclasses.replace(hardware, row_write=free)
  at, _ = solve(problem(), Policy(), hardware)
  for name in CLASSES:
    assert at[name]['device'] == pytest.approx(1, abs=1e-4)


def test_less_memory_is_never_faster():
  hardware = machine(**SLOW)
  took = []
  for device in range(1_200_000, 2_300_000, 100_000):
    _, seconds = solve(problem(device=device), POLICY, hardware)
    took.append(seconds)
  for less, more in itertools.pairwise(took):
    assert more <= less * (1 + _TASTE)
  assert took[-1] < took[0] / 2


SPLITS = {
  'host': (0.0, 1.0, 0.0),
  'disk': (0.0, 0.0, 1.0),
  'mixed': (0.25, 0.25, 0.5),
}


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('split', SPLITS.values(), ids=SPLITS)
def test_settled_classes_are_kept(name, split):
  settled = {name: shares(**{name: split})[name]}
  at, _ = solve(problem(), Policy(), machine(**SLOW), settled=settled)
  assert at[name] == pytest.approx(settled[name])


IMPOSSIBLE = {
  'no room to compute': {'device': 1000},
  'no room at all': {'device': 1_200_000, 'host': 1000, 'disk': 0},
}


@pytest.mark.parametrize('sizes', IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_nothing_where_nothing_fits(sizes):
  assert solve(problem(**sizes), Policy(), machine(**SLOW)) is None
  assert run(Request(prompt_len=16, gen_len=8), **sizes) == []


def test_a_tier_that_is_not_there_gets_nothing():
  p = problem(device=1_300_000, disk=0)
  at, _ = solve(p, POLICY, machine(**SLOW))
  assert all(at[name]['disk'] == 0 for name in CLASSES)
  settled = {'weights': shares(weights='disk')['weights']}
  assert solve(p, POLICY, machine(**SLOW), settled=settled) is None


def test_latency_bounds_a_block():
  p, hardware = problem(device=1_200_000), machine(**SLOW)
  _, least = solve(p, POLICY, hardware)
  assert solve(p, POLICY, hardware, max_latency=0.99 * least) is None
  _, took = solve(p, POLICY, hardware, max_latency=1.01 * least)
  assert took == pytest.approx(least, rel=_TASTE)


# The search around it.


def variant(policy=None, **sizes):
  policy = policy or Policy(prefetch_depth=1)
  base = problem(**sizes)

  def make(work: Workload):
    return dataclasses.replace(base, work=work)

  return Variant(policy, make)


def run(request, policy=None, fixed=None, rates=SLOW, **sizes):
  one = variant(policy, **sizes)
  hardware = machine(**rates)
  guesses = search([one], request, hardware, fixed=fixed)
  plans = (place(guess, hardware, fixed=fixed) for guess in guesses)
  return list(itertools.islice(filter(None, plans), 4))


def rate_of(request, plan, hardware):
  seconds = block_seconds(plan.problem, plan.policy, plan.placement, hardware)
  return request.rate(plan.problem.work, seconds)


BUDGETS = st.fixed_dictionaries(
  {
    'device': st.integers(600_000, 4_000_000),
    'host': st.integers(100_000, 3_000_000),
    'disk': st.sampled_from([0, PLENTY]),
    'unified': st.booleans(),
  }
)
REQUESTS = st.builds(
  Request,
  prompt_len=st.just(16),
  gen_len=st.sampled_from([0, 1, 8]),
  prompts=st.sampled_from([None, 1, 3, 20]),
  batch_size=st.sampled_from([None, None, 3]),
  num_batches=st.sampled_from([None, 2]),
)


@settings(max_examples=12, deadline=None)
@given(REQUESTS, BUDGETS, st.booleans())
def test_what_is_found_fits_and_is_what_was_asked_for(request, sizes, overlap):
  policy = Policy(prefetch_depth=1, overlap=overlap)
  request = request.clamped()
  plans = run(request, policy, **sizes)
  assert len(plans) <= 4
  for plan in plans:
    work = plan.problem.work
    assert plan.fits
    assert all(plan.peak[tier] <= plan.problem.budgets[tier] for tier in TIERS)
    again = evaluate(plan.problem, plan.policy)
    assert (again.peak, again.places) == (plan.peak, plan.places)
    assert (work.prompt_len, work.gen_len) == (16, request.gen_len)
    for name in ('batch_size', 'num_batches'):
      if getattr(request, name) is not None:
        assert getattr(work, name) == getattr(request, name)
    if request.prompts is not None:
      if request.batch_size is None:
        assert work.batch_size <= request.prompts
      assert work.batch_size * (work.num_batches - 1) < request.prompts
  blocks = {
    (plan.problem.work.batch_size, plan.problem.work.num_batches)
    for plan in plans
  }
  assert len(blocks) == len(plans)


GIVEN = {
  'weights': {'weights': Split(0, 100, 0)},
  'cache': {'cache': Split(50, 50, 0)},
  'hidden': {'hidden': Split(0, 0, 100)},
  'attention': {'attention': 'host'},
  'order': {'schedule': 'row', 'prefetch_depth': 3, 'overlap': False},
}


@pytest.mark.parametrize('given_', GIVEN.values(), ids=GIVEN)
def test_what_is_given_is_kept(given_):
  request = Request(prompt_len=16, gen_len=8, prompts=8)
  plans = run(request, Policy(**given_))
  assert plans
  for plan in plans:
    for name, value in given_.items():
      assert getattr(plan.policy, name) == value
    if plan.policy.attention == 'host':
      assert plan.placement['cache']['host'] == 1


def test_loaded_weights_stay_where_they_are():
  request = Request(prompt_len=16, gen_len=8, prompts=8)
  p = problem()
  fixed = {
    key: 'host' if key[1] % 2 else 'device' for key in p.sizes('weights')
  }
  plans = run(request, fixed=fixed)
  assert plans
  for plan in plans:
    assert {k: plan.places[k] for k in fixed} == fixed


def test_no_block_is_much_better_than_the_first():
  """Against the linear program at every block of a fine grid."""
  sizes = {'device': 1_800_000, 'host': 4_000_000}
  hardware, one = machine(**SLOW), variant(**sizes)
  request = Request(prompt_len=16, gen_len=8)
  plans = run(request, **sizes)
  rates = [rate_of(request, plan, hardware) for plan in plans]
  best = 0.0
  for size, batches in itertools.product((1, 2, 3, 5, 8, 12, 20), range(1, 9)):
    work = Workload(
      batch_size=size, num_batches=batches, prompt_len=16, gen_len=8
    )
    if found := solve(one.problem(work), one.policy, hardware):
      best = max(best, request.rate(work, found[1]))
  assert best > 0
  # Whole keys of so small a model are a good part of it.
  assert max(rates) >= 0.9 * best


def test_the_most_promising_come_first():
  request = Request(prompt_len=16, gen_len=8, prompts=50)
  one = variant(device=1_500_000)
  bounds = [g.rate for g in search([one], request, machine(**SLOW))]
  assert len(bounds) > 5
  assert bounds == sorted(bounds, reverse=True)


def test_all_prompts_count_not_those_that_would_fit():
  request = Request(prompt_len=16, gen_len=8, prompts=10)
  one = Workload(batch_size=8, num_batches=1, prompt_len=16, gen_len=8)
  assert request.rate(one, 2.0) == 10 / 4
  five = dataclasses.replace(one, batch_size=5, num_batches=2)
  assert request.rate(five, 2.0) == 10 / 2
  free = dataclasses.replace(request, prompts=None)
  assert free.rate(one, 2.0) == 8 / 2


@pytest.mark.parametrize(
  ('prompts', 'given', 'expected'),
  [
    (3, (100, None), (3, None)),
    (3, (2, 5), (2, 2)),
    (3, (None, 5), (None, 3)),
    (1000, (8, 4), (8, 4)),
    (None, (100, 100), (100, 100)),
  ],
)
def test_a_block_is_no_larger_than_there_are_prompts(prompts, given, expected):
  size, batches = given
  request = Request(
    prompt_len=8,
    gen_len=4,
    prompts=prompts,
    batch_size=size,
    num_batches=batches,
  ).clamped()
  assert (request.batch_size, request.num_batches) == expected
