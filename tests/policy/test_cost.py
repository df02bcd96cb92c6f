"""What a policy costs: affine in the splits, and what one adds up by hand."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.config import MAX_DISK_WRITES, Packing, Policy, Split
from flexjax.hardware import LINKS
from flexjax.policy import cost
from flexjax.policy.charges import Charges
from flexjax.policy.placement import TIERS
from flexjax.policy.plan import evaluate
from flexjax.policy.problem import CLASSES
from tests.machines import machine
from tests.problems import GROUPS, problem, rate, shares

GB = 1e9
# By hand: B = 4, K = 2, T = 16, S = 16 + 8 - 1, D = 64, float32.
K, CACHED, LAYERS = 2, 4, 10
ROW = 2 * 4 * 64 * 4
CACHE = 23 * ROW
HIDDEN = {True: 4 * 16 * 64 * 4, False: 4 * 64 * 4}
QUERY = 4 * 64 * 4
WEIGHTS = sum(GROUPS)
MACHINE = dataclasses.replace(
  machine(), links={link: rate(GB) for link in LINKS}
)


def seconds(p, policy, shares, prefill, hardware=MACHINE):
  return cost.step_seconds(Charges(p, hardware), policy, shares, prefill)


# Affine in the splits.


@st.composite
def fractions(draw):
  """Fractions of every class that sum to 1."""
  found = {}
  for name in CLASSES:
    a, b = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    found[name] = (a, b - a, 1 - b)
  return shares(**found)


@st.composite
def cases(draw):
  """A problem, a policy and a machine."""
  on_host = draw(st.booleans())
  policy = Policy(
    schedule=draw(st.sampled_from(['zigzag', 'row'])),
    overlap=draw(st.booleans()),
    prefetch_depth=draw(st.integers(1, 4)),
    attention='host' if on_host else 'device',
  )
  bits = st.sampled_from([4, 8, 16])
  unified = draw(st.booleans())
  p = problem(
    batch_size=draw(st.integers(1, 8)),
    num_batches=draw(st.integers(1, 4)),
    gen_len=draw(st.sampled_from([0, 1, 2, 8])),
    unified=unified,
    packing=Packing(draw(bits), 32),
    cache_packing=Packing(16 if on_host else draw(bits), 16),
    device=draw(st.sampled_from([10**5, 2**40])),
  )
  contention = draw(st.sampled_from([{}, dict.fromkeys(LINKS, 0.25)]))
  return p, policy, machine(unified=unified, contention=contention)


@settings(max_examples=150, deadline=None)
@given(cases(), fractions(), fractions(), st.floats(0, 1), st.booleans())
def test_a_mix_costs_the_mix_of_costs(case, a, b, part, prefill):
  p, policy, hardware = case
  charges = Charges(p, hardware)
  mix = {
    name: {t: part * a[name][t] + (1 - part) * b[name][t] for t in TIERS}
    for name in CLASSES
  }
  for price in (
    lambda s: cost.step_seconds(charges, policy, s, prefill),
    lambda s: cost.peak_bytes(p, policy, s, prefill),
  ):
    ends, middle = (price(a), price(b)), price(mix)
    for name, got in middle.items():
      expected = part * ends[0][name] + (1 - part) * ends[1][name]
      assert got == pytest.approx(expected, rel=1e-9, abs=1e-15), name


@settings(max_examples=100, deadline=None)
@given(cases(), fractions(), st.booleans())
def test_nothing_costs_less_than_nothing(case, at, prefill):
  p, policy, hardware = case
  busy = seconds(p, policy, at, prefill, hardware)
  assert set(busy) == set(cost.RESOURCES)
  assert all(value >= 0 for value in busy.values())
  assert busy['device'] > 0
  assert busy['dispatch'] > 0
  if p.unified:
    assert not busy['host_to_device'] + busy['device_to_host']


# By hand: bytes that cross links, at 1 GB/s.

DISK, HOST = (
  {'disk_to_host', 'host_to_disk'},
  {
    'host_to_device',
    'device_to_host',
  },
)
BY_HAND = {
  'all on the device': ({}, {}, True, {}),
  'all on the device, decode': ({}, {}, False, {}),
  'weights on host': (
    {},
    {'weights': 'host'},
    False,
    {'host_to_device': WEIGHTS},
  ),
  'weights on host, prefill': (
    {},
    {'weights': 'host'},
    True,
    {'host_to_device': WEIGHTS},
  ),
  'weights on host, row': (
    {'schedule': 'row'},
    {'weights': 'host'},
    False,
    {'host_to_device': K * WEIGHTS},
  ),
  'weights on disk': (
    {},
    {'weights': 'disk'},
    False,
    {'host_to_device': WEIGHTS, 'disk_to_host': WEIGHTS},
  ),
  'weights everywhere': (
    {},
    {'weights': (0.5, 0.25, 0.25)},
    False,
    {'host_to_device': WEIGHTS / 2, 'disk_to_host': WEIGHTS / 4},
  ),
  'cache on host, prefill': (
    {},
    {'cache': 'host'},
    True,
    # Whole caches: rows are padded on the device, and sent in one copy.
    {'device_to_host': K * CACHED * CACHE},
  ),
  'cache on host': (
    {},
    {'cache': 'host'},
    False,
    {
      'host_to_device': K * CACHED * CACHE,
      'device_to_host': K * CACHED * ROW,
    },
  ),
  'cache on host, row': (
    {'schedule': 'row'},
    {'cache': 'host'},
    False,
    {
      'host_to_device': K * CACHED * CACHE,
      'device_to_host': K * CACHED * ROW,
    },
  ),
  'cache attended to on host': (
    {'attention': 'host'},
    {'cache': 'host'},
    False,
    {
      'host_to_device': K * CACHED * QUERY,
      'device_to_host': K * CACHED * (QUERY + ROW),
    },
  ),
  'cache attended to on host, prefill': (
    {'attention': 'host'},
    {'cache': 'host'},
    True,
    {'device_to_host': K * CACHED * 16 * ROW},
  ),
  # The device takes a cache whole, of which 16 to 22 rows are read.
  'cache on disk': (
    {},
    {'cache': 'disk'},
    False,
    {
      'disk_to_host': K * CACHED * 19 * ROW,
      'host_to_device': K * CACHED * CACHE,
      'device_to_host': K * CACHED * ROW,
      # A row's chunks, all keys and all values here, are read and written.
      'host_to_disk': K * CACHED * 2 * CACHE,
    },
  ),
  'hidden on host, prefill': (
    {},
    {'hidden': 'host'},
    True,
    dict.fromkeys(HOST, K * (LAYERS - 1) * HIDDEN[True]),
  ),
  'hidden on disk': (
    {},
    {'hidden': 'disk'},
    False,
    dict.fromkeys(LINKS, K * (LAYERS - 1) * HIDDEN[False]),
  ),
}


@pytest.mark.parametrize('case', BY_HAND.values(), ids=BY_HAND)
def test_links_by_hand(case):
  options, at, prefill, expected = case
  policy = Policy(**options)
  busy = seconds(problem(), policy, shares(**at), prefill)
  for link in LINKS:
    assert busy[link] == pytest.approx(expected.get(link, 0) / GB), link


@pytest.mark.parametrize('case', BY_HAND.values(), ids=BY_HAND)
def test_links_by_hand_on_one_memory(case):
  options, at, prefill, expected = case
  hardware = dataclasses.replace(MACHINE, unified=True)
  p = problem(unified=True)
  busy = seconds(p, Policy(**options), shares(**at), prefill, hardware)
  for link in DISK:
    assert busy[link] == pytest.approx(expected.get(link, 0) / GB), link
  for link in HOST:
    assert busy[link] == 0


def test_a_transfer_costs_by_its_size():
  """Group by group, so that latency counts as often as there are groups."""
  hardware = machine(link=12e9)
  busy = seconds(problem(), Policy(), shares(weights='host'), False, hardware)
  each = [hardware.link('host_to_device', size) for size in GROUPS]
  assert busy['host_to_device'] == pytest.approx(sum(each))
  whole = hardware.link('host_to_device', WEIGHTS)
  assert busy['host_to_device'] > whole + 5e-5


def test_dispatching_by_hand():
  hardware = dataclasses.replace(
    MACHINE, dispatch={'compute': 1.0, 'read': 1e-3, 'write': 1e-6}
  )
  p, cells = problem(), LAYERS * K

  def dispatch(prefill=False, **at):
    return seconds(p, Policy(), shares(**at), prefill, hardware)['dispatch']

  assert dispatch() == cells
  assert dispatch(weights='host') == pytest.approx(cells + 1e-3 * len(GROUPS))
  assert dispatch(cache='host', prefill=True) == pytest.approx(
    cells + 1e-6 * K * CACHED
  )
  assert dispatch(cache='host') == pytest.approx(
    cells + (1e-3 + 1e-6) * K * CACHED
  )
  assert dispatch(hidden='disk') == pytest.approx(
    cells + (1e-3 + 1e-6) * K * (LAYERS - 1)
  )


def test_contention_takes_from_computing():
  at = shares(weights='disk')
  alone = seconds(problem(), Policy(), at, False)
  hardware = dataclasses.replace(MACHINE, contention={'disk_to_host': 0.5})
  both = seconds(problem(), Policy(), at, False, hardware)
  assert both['device'] == pytest.approx(alone['device'] + 0.5 * WEIGHTS / GB)


def test_the_cpu_attends_instead_of_the_device():
  p, at = problem(), shares(cache='host')
  device = seconds(p, Policy(attention='device'), at, False)
  host = seconds(p, Policy(attention='host'), at, False)
  attends = MACHINE.host_attention['float32'](CACHE)
  assert host['cpu'] >= K * CACHED * attends
  assert host['device'] < device['device']
  assert device['cpu'] == 0
  assert seconds(p, Policy(attention='host'), at, True)['cpu'] < host['cpu']


def test_on_one_memory_who_attends_is_the_device():
  p = problem(unified=True)
  hardware = dataclasses.replace(MACHINE, unified=True)
  at, policy = shares(cache='host'), Policy(attention='host')
  busy = seconds(p, policy, at, False, hardware)
  assert busy['cpu'] == 0
  assert busy['device'] > K * CACHED * MACHINE.host_attention['float32'](CACHE)


VISITS = {
  # schedule, batches, of a prefill, expansions of every matrix
  'zigzag, shared': ('zigzag', 3, False, 1),
  'zigzag, shared, prefill': ('zigzag', 3, True, 1),
  'row': ('row', 3, False, 3),
  'a single batch': ('zigzag', 1, False, 1),
}


@pytest.mark.parametrize('case', VISITS.values(), ids=VISITS)
def test_packed_weights_are_expanded_once_a_visit(case):
  schedule, batches, prefill, times = case
  policy = Policy(schedule=schedule)
  plain = problem(num_batches=batches)
  packed = dataclasses.replace(plain, packing=Packing(4))
  hardware = dataclasses.replace(
    MACHINE, expand=dict.fromkeys(('4', '8'), rate(GB))
  )
  none, some = (
    seconds(p, policy, shares(), prefill, hardware) for p in (plain, packed)
  )
  matrices = 4 * (4 * 64 * 64 + 2 * 256 * 64)
  expected = times * matrices / GB
  assert some['device'] - none['device'] == pytest.approx(expected)


@pytest.mark.parametrize('gen_len', [0, 1])
@pytest.mark.parametrize('tier', TIERS)
def test_without_a_cache_its_place_is_of_no_matter(gen_len, tier):
  p = problem(gen_len=gen_len)
  at, other = shares(cache=tier), shares()
  for prefill in (True,) if gen_len else (True, False):
    a, b = (cost.peak_bytes(p, Policy(), s, prefill) for s in (at, other))
    assert a == b
  assert seconds(p, Policy(), at, True) == seconds(p, Policy(), other, True)


# Bytes.


def test_bytes_by_hand():
  p, policy = problem(), Policy(prefetch_depth=1)
  work = {phase: cost.working_bytes(p, policy, phase) for phase in HIDDEN}
  everything = WEIGHTS + K * CACHED * CACHE + K * HIDDEN[True]
  for prefill in (True, False):
    peak = cost.peak_bytes(p, policy, shares(), prefill)
    assert peak['device'] == everything + work[prefill]
    assert peak['host'] == peak['disk'] == 0
    peak = cost.peak_bytes(p, policy, shares(weights='host'), prefill)
    assert peak['host'] == WEIGHTS
    # One visit may still run beside the current one, and one is loaded ahead:
    # the last MLP's group, the head's two, and the embedding's.
    ahead = 132_000 + 256_000 + 512 + 256_000 + 66_000
    assert peak['device'] == everything - WEIGHTS + ahead + work[prefill]
  peak = cost.peak_bytes(p, policy, shares(cache='host'), True)
  sent = 2 * CACHE  # of the computes that may run
  assert peak['device'] == WEIGHTS + K * HIDDEN[True] + work[True] + sent
  peak = cost.peak_bytes(p, policy, shares(cache='host'), False)
  assert peak['device'] == WEIGHTS + K * HIDDEN[True] + work[False] + 2 * CACHE
  peak = cost.peak_bytes(p, policy, shares(cache='disk'), False)
  assert peak['disk'] == K * CACHED * CACHE


def test_a_cache_that_the_cpu_attends_to_is_not_loaded():
  p, at = problem(), shares(cache='host')
  device = cost.peak_bytes(p, Policy(), at, False)
  host = cost.peak_bytes(p, Policy(attention='host'), at, False)
  # Of five cells, two before and two after, three attend.
  assert device['device'] - host['device'] == 3 * CACHE
  assert device['host'] == host['host'] == K * CACHED * CACHE


@pytest.mark.parametrize('name', CLASSES)
def test_without_overlap_less_is_ahead(name):
  at = shares(**{name: 'host'})
  peaks = [
    cost.peak_bytes(problem(), policy, at, False)['device']
    for policy in (
      Policy(overlap=False),
      Policy(prefetch_depth=1),
      Policy(prefetch_depth=4),
    )
  ]
  assert peaks == sorted(peaks)
  assert peaks[0] < peaks[2]


SPLITS = st.tuples(st.integers(0, 10), st.integers(0, 10)).map(
  lambda ab: Split(10 * min(ab), 10 * (max(ab) - min(ab)), 100 - 10 * max(ab))
)


@settings(max_examples=150, deadline=None)
@given(
  st.fixed_dictionaries(dict.fromkeys(CLASSES, SPLITS)),
  st.integers(1, 4),
  st.integers(1, 4),
  st.booleans(),
  st.booleans(),
)
def test_whole_keys_need_no_more_than_a_key_of_each_class(
  splits, batches, depth, overlap, unified
):
  p = problem(num_batches=batches, unified=unified)
  policy = Policy(**splits, prefetch_depth=depth, overlap=overlap)
  plan = evaluate(p, policy)
  at = plan.placement
  affine = {
    tier: max(
      cost.peak_bytes(p, policy, at, prefill)[tier] for prefill in (1, 0)
    )
    for tier in TIERS
  }
  largest = [max(p.sizes(name).values()) for name in CLASSES]
  slack = {'device': sum(largest), 'host': sum(largest), 'disk': 0}
  # What is written to disk is any key, whatever the fraction; and buffers
  # that reads pass through are of every size that there is.
  slack['device' if unified else 'host'] += MAX_DISK_WRITES * max(largest[:2])
  slack['host'] += 0 if unified else sum({*GROUPS} - {max(GROUPS)})
  for tier in TIERS:
    assert abs(plan.peak[tier] - affine[tier]) <= slack[tier] + 1, tier
