"""Decode compiles a fixed number of functions, and transfers explicitly."""

import jax
import pytest
from conftest import make_checkpoint, save_tokenizer

import flexjax
from flexjax import SamplingParams

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]] * 4
POLICIES = {
  'device': {'weights': (100, 0, 0), 'cache': (100, 0, 0)},
  'disk': {
    'weights': (0, 0, 100),
    'cache': (0, 0, 100),
    'hidden': (0, 0, 100),
  },
  'attention on host': {'attention': 'host', 'hidden': (0, 100, 0)},
  'row': {'schedule': 'row', 'weights': (30, 30, 40)},
}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Checkpoints of 2 and of 6 layers, by number of layers."""
  paths = {}
  for layers in (2, 6):
    paths[layers] = path = tmp_path_factory.mktemp('layers') / str(layers)
    make_checkpoint(path, num_hidden_layers=layers)
    save_tokenizer(path)
  return paths


def compilations(path, policy, disk_dir, *, new=4, blocks=1, params=None):
  """Counts what a run compiles; checks it against what JAX says it traced."""
  params = params or SamplingParams(max_new_tokens=new, ignore_eos=True)
  options = {'batch_size': 2, 'num_batches': 2, **policy}
  traced = []

  def on_event(event, seconds, **kwargs):
    if event == '/jax/core/compile/backend_compile_duration':
      traced.append(kwargs)

  with flexjax.load(path, dtype='float32', disk_dir=disk_dir, **options) as llm:
    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
      llm.generate(PROMPTS[: 4 * blocks], params)
    finally:
      jax.monitoring.unregister_event_duration_listener(on_event)
    return llm.stats.compilations, len(traced)


@pytest.mark.parametrize('policy', POLICIES.values(), ids=POLICIES)
def test_compilations_do_not_grow(models, tmp_path, policy):
  ours, jaxs = compilations(models[2], policy, tmp_path / '2')
  # Prefill and decode of three layer kinds, the head, the next input; the
  # writes into a tier, one per shape of new rows.
  assert 0 < ours <= 14
  more = compilations(models[6], policy, tmp_path / '6', new=12, blocks=3)
  assert more[0] == ours
  assert more[1] == jaxs


def test_sampling_compiles_once_per_mode(models, tmp_path):
  policy = POLICIES['device']
  greedy, _ = compilations(models[2], policy, tmp_path)
  params = [
    SamplingParams(
      max_new_tokens=4, ignore_eos=True, temperature=0.5 + n / 10, seed=n
    )
    for n in range(12)
  ]
  drawn, _ = compilations(models[2], policy, tmp_path, blocks=3, params=params)
  assert drawn == greedy


def test_second_call_compiles_nothing(models):
  params = SamplingParams(max_new_tokens=4, ignore_eos=True)
  with flexjax.load(models[2], dtype='float32', batch_size=4) as llm:
    llm.generate(PROMPTS[:4], params)
    first = llm.stats.compilations
    llm.generate(PROMPTS[4:8], params)
    llm.generate([[7] * n for n in (1, 2, 7, 8)], params)
    assert llm.stats.compilations == first


@pytest.mark.parametrize('policy', POLICIES.values(), ids=POLICIES)
def test_no_implicit_transfers(checkpoint, tmp_path, policy):
  c = checkpoint('125m')
  params = SamplingParams(max_new_tokens=5, temperature=0.8, top_k=9, seed=1)
  options = {'batch_size': 2, 'num_batches': 2, 'dtype': 'float32', **policy}
  with flexjax.load(c.path, disk_dir=tmp_path, **options) as llm:
    with jax.transfer_guard('disallow'):
      outputs = llm.generate(c.prompts, params)
      llm.score(c.prompts)
    assert len(outputs) == len(c.prompts)
