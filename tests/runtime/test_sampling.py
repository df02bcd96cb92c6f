"""Draws against the probabilities that they claim to follow."""

import jax
import numpy as np
import pytest

from flexjax.config import SamplingParams
from flexjax.runtime import sampling

DRAWS = 10_000
LOGITS = np.array([2.0, -1.0, 0.5, 1.5, -3.0, 1.0, 0.0, -0.5], np.float32)


def softmax(x):
  p = np.exp(x - x.max())
  return p / p.sum()


def probabilities(temperature=1.0, top_k=0, top_p=1.0):
  """Temperature, then top-k, then top-p: by hand, in float64."""
  x = LOGITS.astype(np.float64) / temperature
  order = np.argsort(-x)
  kept = order[: top_k or len(x)]
  p = softmax(x[kept])
  count = int(np.searchsorted(np.cumsum(p), top_p)) + 1 if top_p < 1 else None
  kept = kept[:count]
  out = np.zeros(len(x))
  out[kept] = softmax(x[kept])
  return out


def draw(params, step=0, seeds=range(DRAWS), logits=LOGITS):
  rows = [params] * len(seeds)
  packed = sampling.pack(rows, np.arange(len(seeds)))
  packed = packed._replace(seed=np.array(seeds, np.uint32))
  pick = jax.jit(sampling.pick, static_argnames='mode')
  x = np.tile(logits, (len(seeds), 1))
  return np.asarray(pick(x, packed, np.int32(step), mode=sampling.mode(rows)))


CASES = {
  'plain': {},
  'cold': {'temperature': 0.5},
  'hot': {'temperature': 3.0},
  'top-k': {'top_k': 3},
  'top-k beyond the vocabulary': {'top_k': 100},
  'top-p': {'top_p': 0.7},
  'hot top-p': {'temperature': 2.0, 'top_p': 0.6},
  'top-k then top-p': {'temperature': 1.5, 'top_k': 4, 'top_p': 0.8},
}


@pytest.mark.parametrize('change', CASES.values(), ids=CASES)
def test_frequencies(change):
  params = SamplingParams(**{'temperature': 1.0, **change})
  expected = probabilities(**{'temperature': 1.0, **change})
  for by in ('seed', 'step'):
    if by == 'seed':
      drawn = draw(params)
    else:  # one seed, many steps: the stream goes on
      drawn = np.concatenate(
        [draw(params, step, range(DRAWS // 20)) for step in range(20)]
      )
    found = np.bincount(drawn, minlength=len(LOGITS)) / len(drawn)
    assert not found[expected == 0].any()
    error = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (abs(found - expected) <= 5 * error + 1e-12).all(), by


@pytest.mark.parametrize('temperature', [1e-3, 1e-30, 1e-40, 1e-300])
def test_cold_is_greedy(temperature):
  params = SamplingParams(temperature=temperature)
  assert set(draw(params, seeds=range(50)).tolist()) == {0}


def test_modes_agree():
  """A row draws the same whatever the others of its batch need."""
  rows = [SamplingParams(temperature=1.0, seed=n) for n in range(200)]
  greedy = [SamplingParams() for _ in range(200)]
  packed = sampling.pack(rows + greedy, np.arange(400))
  x = np.tile(LOGITS, (400, 1))
  drawn = [
    np.asarray(sampling.pick(x, packed, np.int32(3), mode))
    for mode in ('sample', 'filter')
  ]
  np.testing.assert_array_equal(*drawn)
  assert set(drawn[0][200:].tolist()) == {0}
  assert len(set(drawn[0][:200].tolist())) > 4


def test_steps_and_seeds_are_independent():
  params = SamplingParams(temperature=1.0)
  first, second = draw(params, 0), draw(params, 1)
  p = probabilities()
  assert np.mean(first == second) == pytest.approx((p**2).sum(), abs=0.02)
  assert np.mean(first[1:] == second[:-1]) == pytest.approx(
    (p**2).sum(), abs=0.02
  )


MODES = {
  'greedy': [{}, {'top_k': 3, 'top_p': 0.5}],
  'sample': [{}, {'temperature': 1.0}],
  'filter': [{'temperature': 1.0}, {'temperature': 1.0, 'top_p': 0.9}],
}


@pytest.mark.parametrize('mode', MODES)
def test_cheapest_mode(mode):
  rows = [SamplingParams(**fields) for fields in MODES[mode]]
  assert sampling.mode([*rows, None]) == mode
