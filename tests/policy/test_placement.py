"""Fractions -> tiers: the bound on what is achieved, and the spreading."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax.config import Split
from flexjax.policy.placement import TIERS, achieved, spread, total, window

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@st.composite
def splits(draw):
  first, second = sorted(draw(st.tuples(*[st.integers(0, 100)] * 2)))
  return Split(first, second - first, 100 - second)


def keyed(sizes):
  return {('weights', n): size for n, size in enumerate(sizes)}


@given(SIZES, splits())
@example([88, 42, 88, 88], Split(33, 14, 53))  # more than two thirds
def test_achieved_is_within_the_bound(sizes, split):
  keys = keyed(sizes)
  places = spread(keys, split)
  assert list(places) == list(keys)
  asked = sum(p > 0 for p in split)
  # As in the game of emptying the fullest cup: 1/2, or 1/2 + 1/3.
  bound = {1: 0, 2: 1 / 2, 3: 5 / 6}[asked] * max(sizes) / sum(sizes)
  found = achieved(keys, places)
  assert sum(found.values()) == pytest.approx(1)
  for tier, part in zip(TIERS, split, strict=True):
    assert abs(found[tier] - part / 100) <= bound + 1e-9
    assert part or not found[tier]
  held = total(keys, places)
  assert sum(held.values()) == sum(sizes)


@given(st.integers(2, 60), splits())
def test_equal_keys_are_spread_evenly(count, split):
  """Every stretch of keys has its share, within one key of each tier."""
  places = list(spread(keyed([1] * count), split).values())
  for tier, part in zip(TIERS, split, strict=True):
    for begin in range(count):
      for end in range(begin + 1, count + 1):
        have = places[begin:end].count(tier)
        assert abs(have - (end - begin) * part / 100) < 2


def test_a_quarter_is_every_fourth():
  places = list(spread(keyed([7] * 16), Split(75, 0, 25)).values())
  slow = [n for n, tier in enumerate(places) if tier == 'disk']
  assert len(slow) == 4
  gaps = {b - a for a, b in itertools.pairwise(slow)}
  assert gaps == {4}


@given(SIZES, st.integers(0, 50))
def test_window_is_the_largest_sum_going_round(sizes, width):
  width = min(width, len(sizes))
  ring = sizes * 2
  sums = [sum(ring[n : n + width]) for n in range(len(sizes))]
  assert window(sizes, width) == max(sums)


def test_windows_of_nothing_and_of_more_than_all():
  assert window([], 3) == 0
  assert window([5, 1], 9) == 4 * 6 + 5  # it goes round


def test_nothing_to_place():
  assert spread({}, Split(20, 30, 50)) == {}
  assert set(achieved({}, {}).values()) == {0}
