"""On a real accelerator: every tier, both attention places, the same tokens.

Skipped where JAX has only a CPU. Float32 products are asked for in full, or
an accelerator rounds them to fewer bits.
"""

import jax
import pytest

import flexjax

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    jax.default_backend() == 'cpu', reason='needs an accelerator'
  ),
]

PROMPTS = ['def ', 'import os\n', 'class Counter:\n    def __init__(']
POLICIES = {
  'device': {'weights': (100, 0, 0), 'cache': (100, 0, 0)},
  'host': {
    'weights': (0, 100, 0),
    'cache': (0, 100, 0),
    'attention': 'device',
  },
  'disk': {'weights': (0, 0, 100), 'cache': (0, 0, 100)},
  'all three': {
    'weights': (30, 40, 30),
    'cache': (30, 40, 30),
    'hidden': (30, 40, 30),
    'num_batches': 3,
  },
  'row order': {
    'weights': (0, 100, 0),
    'cache': (0, 100, 0),
    'schedule': 'row',
    'attention': 'device',
    'num_batches': 3,
  },
  'host attention': {
    'weights': (0, 100, 0),
    'cache': (0, 100, 0),
    'attention': 'host',
  },
}


@pytest.fixture(scope='module')
def expected():
  return run(batch_size=3)


def run(dtype='float32', **policy):
  params = flexjax.SamplingParams(max_new_tokens=24, ignore_eos=True)
  with (
    jax.default_matmul_precision('highest'),
    flexjax.load(dtype=dtype, **policy) as llm,
  ):
    outputs = llm.generate(PROMPTS, params)
    scores = llm.score(PROMPTS)
  return [o.token_ids for o in outputs], [s.logprobs[1:] for s in scores]


@pytest.mark.parametrize('policy', POLICIES.values(), ids=POLICIES)
def test_policies_agree(policy, expected, tmp_path):
  tokens, scores = run(batch_size=1, disk_dir=tmp_path, **policy)
  assert tokens == expected[0]
  for mine, theirs in zip(scores, expected[1], strict=True):
    assert mine == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('bits', [(4, 16), (16, 4), (4, 4), (8, 8)])
def test_packed_placements_agree(bits, dtype, tmp_path):
  packed = {'weight_bits': bits[0], 'cache_bits': bits[1], 'dtype': dtype}
  expected = run(batch_size=1, **packed)
  for name in ('host', 'disk', 'all three', 'row order'):
    folder = tmp_path / name
    found = run(batch_size=1, disk_dir=folder, **packed, **POLICIES[name])
    assert found[0] == expected[0], name
    for mine, theirs in zip(found[1], expected[1], strict=True):
      assert mine == pytest.approx(theirs, abs=2e-4), name


def test_budget_is_the_allocators_cap(tmp_path):
  with flexjax.load(dtype='float32', device_memory='1GiB') as llm:
    llm.generate(PROMPTS)
    peak = llm.stats.allocator_peak_bytes
  assert peak is not None
  assert peak < 2**30
