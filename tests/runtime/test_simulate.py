"""Predictions against what one works out by hand, and what must not matter."""

import collections
import dataclasses
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexjax.config import Packing, Policy, Split
from flexjax.hardware import LINKS
from flexjax.policy import cost
from flexjax.policy.charges import Charges
from flexjax.policy.plan import evaluate
from flexjax.runtime.simulate import predict, timeline
from tests.machines import machine
from tests.problems import GROUPS, LAYERS, problem, rate

DEVICE, HOST, DISK = Split(100, 0, 0), Split(0, 100, 0), Split(0, 0, 100)
MIXED = Split(30, 30, 40)
NOTHING = dict.fromkeys(('compute', 'read', 'write'), 0.0)
CACHE, ROW = 47_104, 2_048  # bytes of a (layer, batch) cache, and of a row
CACHED = 4
# A head of its own table, so that every group belongs to one layer.
UNTIED = (*LAYERS[:-1], ('head', (10,)))
WEIGHTS = sum(GROUPS)
STEPS = 8


def plan(policy=None, p=None, **sizes):
  """A plan for the small model; what is not said is on the device."""
  splits = {'weights': DEVICE, 'cache': DEVICE, 'hidden': DEVICE}
  policy = Policy(**splits | (policy or {}))
  return evaluate(p or problem(layers=UNTIED, **sizes), policy)


def made(*, dispatch=0.0, unified=False, contention=None, **rates):
  """A machine that dispatches at once, and whose links have no latency."""
  links = dict.fromkeys(LINKS, 1e12) | rates
  return dataclasses.replace(
    machine(unified=unified, contention=contention),
    links={link: rate(links[link]) for link in LINKS},
    dispatch={**NOTHING, 'compute': dispatch},
  )


def computing(p, hardware, prefill):
  """Seconds of all layer functions of a step."""
  charges = Charges(p, hardware)
  cells = [charges.layer(kind, prefill) for kind, _ in p.layers]
  return p.work.num_batches * sum(cells)


def rows_written(p, hardware, prefill):
  cells = p.work.num_batches * CACHED
  return cells * Charges(p, hardware).write_rows('device', prefill, False)


def step(prediction):
  return prediction.decode_seconds / (STEPS - 1)


# By hand.


@pytest.mark.parametrize('schedule', ['zigzag', 'row'])
@pytest.mark.parametrize('batches', [1, 3])
def test_on_the_device_computing_is_all(schedule, batches):
  one = plan({'schedule': schedule}, num_batches=batches)
  hardware = made()
  got = predict(one, hardware, first=STEPS)
  expected = {
    prefill: computing(one.problem, hardware, prefill)
    + rows_written(one.problem, hardware, prefill)
    for prefill in (True, False)
  }
  total = expected[True] + (STEPS - 1) * expected[False]
  assert got.seconds == pytest.approx(total, rel=1e-6)
  assert got.link_bytes == dict.fromkeys(LINKS, 0)
  assert got.tokens == 4 * batches * STEPS
  assert got.throughput_tokens_per_s == pytest.approx(got.tokens / total)
  if schedule == 'zigzag':
    assert got.prefill_seconds == pytest.approx(expected[True], rel=0.01)
    assert got.binding('prefill') == got.binding('decode') == 'device'
    assert got.busy['decode']['device'] == pytest.approx(1, rel=0.01)


def test_slow_dispatching_is_all():
  one = plan(num_batches=3)
  got = predict(one, made(dispatch=1.0))
  assert step(got) == pytest.approx(len(LAYERS) * 3, rel=1e-3)
  assert got.prefill_seconds == pytest.approx(len(LAYERS) * 3, rel=1e-3)
  assert got.binding('decode') == 'dispatch'


WAYS = {
  # policy, the slow link, bytes that a decode step brings over it
  'weights': ({'weights': HOST}, 'host_to_device', WEIGHTS),
  'weights, no overlap': (
    {'weights': HOST, 'overlap': False},
    'host_to_device',
    WEIGHTS,
  ),
  'weights, row': (
    {'weights': HOST, 'schedule': 'row'},
    'host_to_device',
    2 * WEIGHTS,
  ),
  'weights from disk': ({'weights': DISK}, 'disk_to_host', WEIGHTS),
  'weights from disk, upwards': (
    {'weights': DISK},
    'host_to_device',
    WEIGHTS,
  ),
  'cache': ({'cache': HOST}, 'host_to_device', 2 * CACHED * CACHE),
  # Of 16 to 22 rows, 19 on the average.
  'cache from disk': ({'cache': DISK}, 'disk_to_host', 2 * CACHED * 19 * ROW),
  'new rows': ({'cache': HOST}, 'device_to_host', 2 * CACHED * ROW),
  'hidden': ({'hidden': HOST}, 'host_to_device', 2 * 9 * 1024),
  'hidden to disk': ({'hidden': DISK}, 'host_to_disk', 2 * 9 * 1024),
}


@pytest.mark.parametrize('case', WAYS.values(), ids=WAYS)
def test_a_slow_link_is_all(case):
  policy, link, nbytes = case
  got = predict(plan(policy), made(**{link: 1e4}))
  assert step(got) == pytest.approx(nbytes / 1e4, rel=0.02)
  assert got.binding('decode') == link
  assert got.busy['decode'][link] == pytest.approx(1, abs=0.02)


def test_writes_of_the_prefill_go_on_in_decode():
  got = predict(plan({'cache': DISK}), made(host_to_disk=1e4))
  nbytes = 2 * CACHED * (16 + STEPS - 1) * ROW
  assert got.link_bytes['host_to_disk'] == nbytes
  # A decode step rewrites the chunks of its rows, here whole caches.
  later = 2 * CACHED * 2 * CACHE
  charged = 2 * CACHED * 16 * ROW + (STEPS - 1) * later
  # Nobody waits for the last ones.
  assert 0.9 * charged / 1e4 < got.seconds <= charged / 1e4
  assert step(got) == pytest.approx(later / 1e4, rel=0.2)
  assert got.binding('decode') == 'host_to_disk'


def test_a_table_shared_by_head_and_embedding_crosses_once_a_step():
  tied = problem()
  got = predict(plan({'weights': HOST}, tied), made(host_to_device=1e4))
  assert step(got) == pytest.approx(WEIGHTS / 1e4, rel=0.02)


def test_without_overlap_everything_adds_up():
  one = plan({'weights': HOST, 'overlap': False}, num_batches=1)
  hardware = made(host_to_device=1e10)
  got = predict(one, hardware)
  busy = WEIGHTS / 1e10 + computing(one.problem, hardware, False)
  busy += rows_written(one.problem, hardware, False)
  assert step(got) == pytest.approx(busy, rel=0.01)


def test_the_cpu_attends_meanwhile():
  one = plan({'cache': HOST, 'attention': 'host'}, num_batches=2)
  curve = rate(1e4)
  hardware = dataclasses.replace(
    made(), host_attention=dict.fromkeys(('float32', 'bfloat16'), curve)
  )
  got = predict(one, hardware)
  assert step(got) == pytest.approx(2 * CACHED * CACHE / 1e4, rel=0.02)
  assert got.binding('decode') == 'cpu'
  assert got.link_bytes['host_to_device'] == (STEPS - 1) * 2 * CACHED * 1024


def test_contention_is_lost_to_computing():
  one = plan({'weights': DISK})
  alone, lost = (
    predict(one, made(disk_to_host=1e11, contention={'disk_to_host': part}))
    for part in (0, 10)
  )
  expected = 10 * WEIGHTS / 1e11
  assert step(lost) - step(alone) == pytest.approx(expected, rel=0.1)


def test_a_lone_read_takes_its_own_time():
  slow = {'disk_to_host': rate(1e9)}
  hardware = dataclasses.replace(made(disk_to_host=1e11), alone=slow)
  ahead, lone = (
    step(predict(plan({'weights': DISK, 'overlap': overlap}), hardware))
    for overlap in (True, False)
  )
  assert lone - ahead == pytest.approx(WEIGHTS / 1e9, rel=0.1)


def test_what_a_run_has_written_is_read_at_its_own_rate():
  slow = {'disk_to_host': rate(1e6)}
  usual = made(disk_to_host=1e11)
  hardware = dataclasses.replace(usual, fresh=slow)
  for policy, differs in (
    ({'weights': DISK}, False),
    ({'cache': DISK}, True),
    ({'hidden': DISK}, True),
  ):
    steps = [step(predict(plan(policy), h)) for h in (usual, hardware)]
    if differs:
      assert steps[1] > 2 * steps[0], policy
    else:
      assert steps[1] == steps[0], policy


# The same charges as in the cost model.

PLACES = {
  'device': {},
  'host': {'weights': HOST, 'cache': HOST, 'hidden': HOST},
  'disk': {'weights': DISK, 'cache': DISK, 'hidden': DISK},
  'attended on host': {'weights': HOST, 'cache': HOST, 'attention': 'host'},
  'packed': {'weights': HOST, 'cache': DISK, 'weight_bits': 4},
}


@pytest.mark.parametrize('place', PLACES.values(), ids=PLACES)
@pytest.mark.parametrize('unified', [False, True], ids=['two', 'one memory'])
@pytest.mark.parametrize(
  ('schedule', 'overlap', 'batches'),
  [('zigzag', True, 1), ('zigzag', False, 3), ('row', True, 3)],
)
def test_charges_are_those_of_the_cost_model(
  place, unified, schedule, overlap, batches
):
  bits = place.get('weight_bits', 16)
  one = plan(
    place | {'schedule': schedule, 'overlap': overlap},
    num_batches=batches,
    unified=unified,
    packing=Packing(bits),
    cache_packing=Packing(bits, 32),
  )
  hardware = machine(unified=unified)
  got = predict(one, hardware, first=STEPS)
  charges = Charges(one.problem, hardware)
  for phase, seconds in (
    ('prefill', got.prefill_seconds),
    ('decode', step(got)),
  ):
    busy = cost.step_seconds(
      charges, one.policy, one.placement, phase == 'prefill'
    )
    for resource, part in got.busy[phase].items():
      if resource == 'cpu' and place.get('attention') == 'host' and not unified:
        # There the cost model adds what the CPU waits for.
        assert part * seconds <= busy[resource] * 1.01
        continue
      # The mean of a cache's reads is the read of its mean, latency apart.
      assert part * seconds == pytest.approx(busy[resource], rel=0.01), (
        phase,
        resource,
      )


# What must not make it slower.

SPLITS = st.sampled_from([DEVICE, HOST, DISK, MIXED])


@st.composite
def policies(draw):
  policy = {
    'weights': draw(SPLITS),
    'cache': draw(SPLITS),
    'hidden': draw(SPLITS),
    'schedule': draw(st.sampled_from(['zigzag', 'row'])),
    'prefetch_depth': draw(st.integers(1, 4)),
    'overlap': draw(st.booleans()),
  }
  if draw(st.booleans()):
    policy |= {'attention': 'host', 'cache': HOST}
  return policy


SIZES = st.fixed_dictionaries(
  {
    'num_batches': st.integers(1, 3),
    'gen_len': st.integers(1, 6),
    'unified': st.booleans(),
  }
)
RATES = st.fixed_dictionaries(
  {
    'link': st.sampled_from([1e7, 1e9, 1e11]),
    'drive': st.sampled_from([1e7, 1e9]),
    'flops': st.sampled_from([1e10, 1e13]),
    'dispatch': st.sampled_from([1e-6, 1e-3]),
  }
)


@settings(max_examples=40, deadline=None)
@given(policies(), SIZES, RATES, st.sampled_from(['link', 'drive', 'flops']))
def test_a_faster_machine_is_never_slower(policy, sizes, rates, what):
  one, unified = plan(policy, **sizes), sizes['unified']
  slow = predict(one, machine(unified=unified, **rates))
  rates = {**rates, what: 4 * rates[what]}
  fast = predict(one, machine(unified=unified, **rates))
  assert fast.seconds <= slow.seconds * (1 + 1e-9)
  assert fast.peak_bytes == slow.peak_bytes
  assert fast.link_bytes == slow.link_bytes


@settings(max_examples=40, deadline=None)
@given(policies(), SIZES, RATES)
def test_overlap_and_looking_ahead_are_never_slower(policy, sizes, rates):
  """Where weights alone are loaded: a link serves whoever comes first, so
  that small hidden states may wait behind weights that have time."""
  policy = {name: policy[name] for name in ('weights', 'schedule')}
  hardware = machine(unified=sizes['unified'], **rates)
  seconds = [
    predict(plan({**policy, **change}, **sizes), hardware).seconds
    for change in (
      {'overlap': False},
      {'overlap': True, 'prefetch_depth': 1},
      {'overlap': True, 'prefetch_depth': 3},
    )
  ]
  for less, more in itertools.pairwise(seconds):
    assert more <= less * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(policies(), SIZES, RATES)
def test_watching_tokens_is_never_faster(policy, sizes, rates):
  one, hardware = plan(policy, **sizes), machine(**rates)
  assert (
    predict(one, hardware, watched=True).seconds
    >= predict(one, hardware).seconds * 0.98
  )


AHEAD_OF_A_PREFILL = (
  {'weights': Split(0, 0, 100), 'prefetch_depth': 3},
  {'num_batches': 2, 'gen_len': 24, 'unified': True},
  {'link': 1e7, 'drive': 1e9, 'flops': 1e13, 'dispatch': 1e-6},
)


@settings(max_examples=30, deadline=None)
@given(policies(), SIZES, RATES)
@example(*AHEAD_OF_A_PREFILL)
def test_later_steps_are_like_the_first(policy, sizes, rates):
  sizes = {**sizes, 'gen_len': 24}
  one = plan(policy, **sizes)
  hardware = machine(unified=sizes['unified'], **rates)
  some, all_ = (predict(one, hardware, first=n) for n in (None, 24))
  assert some.seconds == pytest.approx(all_.seconds, rel=0.05)
  for link in LINKS:
    assert some.link_bytes[link] == pytest.approx(
      all_.link_bytes[link], rel=1e-6
    )
  for tier, size in all_.peak_bytes.items():
    assert size <= some.peak_bytes[tier] <= 1.05 * size


@settings(max_examples=40, deadline=None)
@given(policies(), SIZES)
def test_planned_bytes_hold_what_is_predicted(policy, sizes):
  one = plan(policy, **sizes)
  got = predict(one, machine(unified=sizes['unified']))
  for tier, size in got.peak_bytes.items():
    assert 0 <= size <= one.peak[tier]


@pytest.mark.parametrize('batches', [1, 3])
def test_the_row_order_reads_weights_for_every_batch(batches):
  read = {
    schedule: predict(
      plan({'weights': HOST, 'schedule': schedule}, num_batches=batches),
      made(),
    ).link_bytes['host_to_device']
    for schedule in ('zigzag', 'row')
  }
  assert read['zigzag'] == STEPS * WEIGHTS
  assert read['row'] == batches * read['zigzag']


# The timeline.

LINES = {
  'zigzag': {'weights': MIXED, 'cache': MIXED, 'hidden': MIXED},
  'row': {'weights': HOST, 'cache': DISK, 'schedule': 'row'},
  'no overlap': {'weights': DISK, 'cache': HOST, 'overlap': False},
}
KINDS = ('embed', 'attention', 'mlp', 'head')


@pytest.mark.parametrize('policy', LINES.values(), ids=LINES)
def test_the_timeline_holds_every_cell_once(policy):
  one = plan(policy, num_batches=2)
  hardware = machine()
  spans = timeline(one, hardware)
  cells = collections.Counter(
    tuple(span.args[n] for n in 'ijk')
    for span in spans
    if span.track == 'device' and span.name.split()[0] in KINDS
  )
  assert set(cells.values()) == {1}
  assert set(cells) == set(
    itertools.product(range(STEPS), range(len(LAYERS)), range(2))
  )
  by_track = collections.defaultdict(list)
  for span in spans:
    assert span.end > span.begin >= 0
    by_track[span.track].append(span)
  for mine in by_track.values():
    mine.sort(key=lambda span: span.begin)
    for a, b in itertools.pairwise(mine):
      assert b.begin >= a.end - 1e-12
  got = predict(one, hardware, first=STEPS)
  last = max(span.end for span in by_track['device'])
  assert last == pytest.approx(got.seconds, rel=0.01)
  moved = collections.Counter()
  for span in spans:
    moved[span.track] += span.args.get('bytes', 0)
  for link in LINKS:
    expected = got.link_bytes[link]
    if link == 'host_to_device' and policy['cache'] != HOST:
      # A cache from disk goes up whole; counted are the rows that were read.
      assert moved[link] >= expected
    else:
      assert moved[link] == pytest.approx(expected, rel=1e-6), link


@pytest.mark.parametrize('depth', [1, 2, 4])
def test_waiting_bounds_how_far_it_runs_ahead(depth):
  """No load begins before the compute 3 x depth visits earlier has ended."""
  one = plan({'weights': DISK, 'prefetch_depth': depth}, num_batches=1)
  spans = timeline(one, machine(flops=1e8, drive=1e12))
  ends, begins = {}, {}
  for span in spans:
    n = span.args['i'] * len(LAYERS) + span.args['j']
    if span.track == 'device' and span.name.split()[0] in KINDS:
      ends[n] = span.end
    if span.track == 'disk_to_host':
      begins[n] = span.begin
  assert len(begins) > 20
  for n, begin in begins.items():
    if (before := n - 3 * depth - 1) >= 0:
      assert begin >= ends[before]
  last = max(begins)
  assert begins[last] > ends[last - 3 * depth - 2]
  assert begins[last] < ends[last - 1]
