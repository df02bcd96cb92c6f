"""The order of Actions, without JAX: every rule, for any block."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.schedule.zigzag import ORDERS, Action, Shape, actions

BLOCKS = st.fixed_dictionaries(
  {
    'steps': st.integers(1, 4),
    'layers': st.integers(3, 7),
    'batches': st.integers(1, 4),
    'depth': st.integers(1, 9),
    'overlap': st.booleans(),
    'order': st.sampled_from(sorted(ORDERS)),
  }
)
ENDS = st.lists(st.integers(1, 4), min_size=4, max_size=4)


def run(block, wanted=None):
  """Returns the shape and all actions; odd layers keep a cache."""
  layers = block['layers']
  cached = frozenset(range(1, layers - 1, 2))
  shape = Shape(block['steps'], layers, block['batches'], cached)
  return shape, list(
    actions(
      shape,
      ORDERS[block['order']](shape),
      depth=block['depth'],
      overlap=block['overlap'],
      **({} if wanted is None else {'wanted': wanted}),
    )
  )


def check(shape, done, block):
  """Asserts every rule that holds whatever the order."""
  weights: Counter = Counter()
  loaded: set = set()
  at: dict = {}
  computed, waited = [], 0
  for n, (kind, i, j, k) in enumerate(done):
    match kind:
      case 'load_weights':
        weights[i, j] += 1
        assert sum(weights.values()) <= 2 + block['depth']
      case 'free_weights':
        assert weights[i, j] > 0
        weights[i, j] -= 1
      case 'load_cache' | 'load_hidden':
        assert (kind, i, j, k) not in loaded, 'loaded twice'
        loaded.add((kind, i, j, k))
        if kind == 'load_cache':
          assert j in shape.cached
          assert at['store_cache', i - 1, j, k] < n
        else:
          assert at['store_hidden', i, j - 1, k] < n
      case 'compute':
        assert weights[i, j] > 0, 'weights are not here'
        if j > 0:
          loaded.remove(('load_hidden', i, j, k))
        if i > 0 and j in shape.cached:
          loaded.remove(('load_cache', i, j, k))
        if i > 0:
          assert ('compute', i - 1, shape.layers - 1, k) in at
        computed.append((i, j, k))
      case 'skip':
        loaded -= {('load_hidden', i, j, k), ('load_cache', i, j, k)}
      case 'store_cache' | 'store_hidden':
        assert done[n - 1][1:] == (i, j, k)
      case 'wait':
        assert (i, j, k) == computed[waited], 'waits in order'
        waited += 1
      case _:
        raise AssertionError(kind)
    at[kind, i, j, k] = n
    if block['overlap']:
      assert len(computed) - waited <= 2 * block['depth'] + 1
    elif kind == 'load_weights':
      assert len(computed) == waited, 'loads while it computes'
  assert not +weights, 'weights are left'
  assert not loaded, 'loaded for nothing'
  return computed


@given(BLOCKS)
def test_every_cell_once(block):
  shape, done = run(block)
  computed = check(shape, done, block)
  cells = [
    (i, j, k)
    for v in ORDERS[block['order']](shape)
    for i, j in [v[:2]]
    for k in v.batches
  ]
  assert computed == cells
  assert len(set(cells)) == len(cells)
  assert len(cells) == shape.steps * shape.layers * shape.batches
  kinds = Counter(action.kind for action in done)
  visits = len(list(ORDERS[block['order']](shape)))
  assert kinds['load_weights'] == kinds['free_weights'] == visits
  rows = shape.batches * len(shape.cached)
  assert kinds['load_cache'] == rows * (shape.steps - 1)
  # A block of one token, scoring for one, keeps no cache.
  assert kinds['store_cache'] == (rows * shape.steps if shape.steps > 1 else 0)
  moves = shape.steps * shape.batches * (shape.layers - 1)
  assert kinds['load_hidden'] == kinds['store_hidden'] == moves
  assert kinds['skip'] == 0


@given(BLOCKS, ENDS)
def test_batches_that_are_known_to_end(block, ends):
  """Batch k wants `ends[k]` tokens: nothing is done for it beyond."""
  shape, done = run(block, lambda i, k, now: i < ends[k])
  computed = check(shape, done, block)
  expected = {
    (i, j, k)
    for k in range(shape.batches)
    for i in range(min(ends[k], shape.steps))
    for j in range(shape.layers)
  }
  assert set(computed) == expected
  assert len(computed) == len(expected)


@given(BLOCKS, ENDS)
@settings(max_examples=60)
def test_batches_that_end_unforeseen(block, ends):
  """They are looked at when their turn comes: what was loaded is dropped."""
  seen: set = set()

  def wanted(i, k, now):
    ended = i >= ends[k]
    if now and ended:
      seen.add(k)
    return not ended if now else k not in seen

  shape, done = run(block, wanted)
  computed = check(shape, done, block)
  assert len(set(computed)) == len(computed)
  assert all(i < ends[k] for i, _, k in computed)
  for k in range(shape.batches):
    cells = min(ends[k], shape.steps) * shape.layers
    assert sum(c[2] == k for c in computed) == cells
  # Beyond the end, no more visits than were in sight.
  last = max(min(e, shape.steps) for e in ends[: shape.batches])
  per_step = shape.layers
  if block['order'] == 'zigzag':
    loads = sum(a.kind == 'load_weights' for a in done)
    ahead = block['depth'] if block['overlap'] else 0
    assert loads <= last * per_step + ahead + 1


ORDER = {
  'zigzag': [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)],
  'row': [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)],
}


@pytest.mark.parametrize('order', ORDER)
def test_order_of_a_small_block(order):
  done = actions(Shape(2, 2, 2), ORDERS[order](Shape(2, 2, 2)), depth=1)
  computed = [action[1:] for action in done if action.kind == 'compute']
  assert computed[:6] == ORDER[order]
  assert len(computed) == 8


def test_one_layer_spelled_out():
  shape = Shape(1, 2, 1)
  done = actions(shape, ORDERS['row'](shape), depth=1, overlap=False)
  assert list(done) == [
    Action('load_weights', 0, 0, -1),
    Action('compute', 0, 0, 0),
    Action('store_hidden', 0, 0, 0),
    Action('wait', 0, 0, 0),
    Action('free_weights', 0, 0, -1),
    Action('load_weights', 0, 1, -1),
    Action('load_hidden', 0, 1, 0),
    Action('compute', 0, 1, 0),
    Action('wait', 0, 1, 0),
    Action('free_weights', 0, 1, -1),
  ]


@pytest.mark.parametrize('depth', [1, 2, 5])
def test_loads_are_ahead_by_the_depth(depth):
  shape = Shape(3, 8, 2, frozenset({1, 3, 5}))
  done = list(actions(shape, ORDERS['zigzag'](shape), depth=depth))
  loads = [a[1:3] for a in done if a.kind == 'load_weights']
  for n, visit in enumerate(loads[depth:]):
    # Issued before the first compute of the visit `depth` places before.
    first = next(
      m
      for m, a in enumerate(done)
      if a.kind == 'compute' and a[1:3] == loads[n]
    )
    assert done.index(Action('load_weights', *visit, -1)) < first
