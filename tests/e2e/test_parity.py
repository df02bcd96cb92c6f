"""Log-probabilities and greedy tokens against transformers, in float32."""

import numpy as np
import pytest
from conftest import MODELS, NEW_TOKENS, logits_of, make_checkpoint

import flexjax
from flexjax import SamplingParams

TOLERANCE = 2e-4
DEVICE, HOST, DISK = (100, 0, 0), (0, 100, 0), (0, 0, 100)
MIXED = (30, 30, 40)
DEFAULT = {
  'weights': DEVICE,
  'cache': DEVICE,
  'hidden': DEVICE,
  'batch_size': 3,
  'num_batches': 3,
  'schedule': 'zigzag',
  'attention': 'device',
  'overlap': True,
  'prefetch_depth': 2,
}
# Every value of every knob, and most pairs of values.
POLICIES = {
  'device, 1 batch': {'num_batches': 1},
  'device, row': {'schedule': 'row', 'num_batches': 2, 'prefetch_depth': 5},
  'weights on host': {
    'weights': HOST,
    'cache': HOST,
    'hidden': HOST,
    'num_batches': 2,
    'prefetch_depth': 1,
  },
  'all on disk': {'weights': DISK, 'cache': DISK, 'hidden': DISK},
  'all on disk, deep': {
    'weights': DISK,
    'cache': DISK,
    'hidden': DISK,
    'batch_size': 2,
    'num_batches': 4,
    'prefetch_depth': 5,
  },
  'all on disk, no overlap': {
    'weights': DISK,
    'cache': DISK,
    'hidden': DISK,
    'overlap': False,
    'num_batches': 2,
  },
  'all on disk, row': {
    'weights': DISK,
    'cache': DISK,
    'hidden': DISK,
    'schedule': 'row',
    'prefetch_depth': 1,
  },
  'all mixed': {
    'weights': MIXED,
    'cache': MIXED,
    'hidden': MIXED,
    'batch_size': 2,
    'num_batches': 4,
    'prefetch_depth': 1,
  },
  'all mixed, row': {
    'weights': MIXED,
    'cache': MIXED,
    'hidden': MIXED,
    'schedule': 'row',
    'num_batches': 4,
    'batch_size': 2,
    'prefetch_depth': 5,
  },
  'all mixed, no overlap, 1 batch': {
    'weights': MIXED,
    'cache': MIXED,
    'hidden': MIXED,
    'overlap': False,
    'num_batches': 1,
    'batch_size': 9,
  },
  'attention on host': {
    'cache': HOST,
    'attention': 'host',
    'num_batches': 4,
    'batch_size': 2,
  },
  'attention on host, row, disk': {
    'weights': DISK,
    'cache': HOST,
    'hidden': DISK,
    'attention': 'host',
    'schedule': 'row',
    'num_batches': 2,
    'prefetch_depth': 5,
  },
  'attention on host, no overlap, mixed': {
    'weights': MIXED,
    'cache': HOST,
    'hidden': MIXED,
    'attention': 'host',
    'overlap': False,
    'prefetch_depth': 1,
  },
  'one row at a time': {'batch_size': 1, 'num_batches': 4, 'cache': DISK},
}


def assert_scores(scores, expected):
  for n, (score, logprobs) in enumerate(zip(scores, expected, strict=True)):
    assert score.index == n
    assert score.logprobs[0] is None
    assert len(score.logprobs) == len(score.token_ids) == len(logprobs) + 1
    actual = np.array(score.logprobs[1:], np.float64)
    np.testing.assert_allclose(actual, logprobs, atol=TOLERANCE, rtol=0)


def assert_greedy(outputs, expected, lengths):
  for n, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
    assert output.index == n
    assert output.token_ids == tokens[: lengths[n]], f'prompt {n}'
    assert output.finish_reason == 'length'


@pytest.mark.parametrize('name', MODELS)
def test_models(checkpoint, name):
  c = checkpoint(name)
  longest = max(NEW_TOKENS)
  params = SamplingParams(max_new_tokens=longest, ignore_eos=True)
  with flexjax.load(c.path, dtype='float32') as llm:
    scores = llm.score(c.prompts)
    assert [s.token_ids for s in scores] == c.prompts
    assert_scores(scores, c.logprobs)
    outputs = llm.generate(c.prompts, params)
    assert_greedy(outputs, c.tokens, [longest] * len(c.prompts))


@pytest.mark.parametrize('changes', POLICIES.values(), ids=POLICIES)
def test_policies(checkpoint, tmp_path, changes):
  c = checkpoint('125m')
  params = [
    SamplingParams(max_new_tokens=n, ignore_eos=True) for n in NEW_TOKENS
  ]
  options = {**DEFAULT, **changes, 'dtype': 'float32', 'disk_dir': tmp_path}
  with flexjax.load(c.path, **options) as llm:
    outputs = llm.generate(c.prompts, params)
    assert_greedy(outputs, c.tokens, NEW_TOKENS)
    assert llm.stats.generated_tokens == sum(NEW_TOKENS)
    assert_scores(llm.score(c.prompts), c.logprobs)
    assert llm.stats.scored_tokens == sum(map(len, c.logprobs))
  assert not list(tmp_path.glob('run-*'))


@pytest.mark.parametrize('name', MODELS)
def test_greedy_tokens_are_known(checkpoint, tmp_path, name):
  """Also in batches of ragged texts whose tokens are in part greedy."""
  c = checkpoint(name)
  texts = [p + t for p, t in zip(c.prompts, c.tokens, strict=True)]
  options = {**DEFAULT, 'batch_size': 2, 'disk_dir': tmp_path}
  if name != '125m':
    options |= {'weights': MIXED, 'hidden': MIXED}
  with flexjax.load(c.path, dtype='float32', **options) as llm:
    scores = llm.score(texts)
    compilations = llm.stats.compilations
    llm.score(texts[::-1])
    assert llm.stats.compilations == compilations
  for score, text, prompt in zip(scores, texts, c.prompts, strict=True):
    likeliest = logits_of(c.model, text).argmax(-1).tolist()
    expected = [a == b for a, b in zip(likeliest, text[1:], strict=False)]
    assert score.greedy == [None, *expected]
    assert all(score.greedy[len(prompt) :])
  known = [greedy for score in scores for greedy in score.greedy]
  assert {True, False, None} == set(known)


COMBINED = {
  '350m': {'weights': MIXED, 'cache': DISK, 'hidden': MIXED},
  'galactica': {'weights': DISK, 'cache': HOST, 'attention': 'host'},
  'untied': {'weights': DISK, 'cache': MIXED, 'schedule': 'row'},
}


@pytest.mark.parametrize('name', COMBINED)
def test_models_in_tiers(checkpoint, tmp_path, name):
  c = checkpoint(name)
  params = [
    SamplingParams(max_new_tokens=n, ignore_eos=True) for n in NEW_TOKENS
  ]
  options = {
    **DEFAULT,
    **COMBINED[name],
    'dtype': 'float32',
    'disk_dir': tmp_path,
  }
  with flexjax.load(c.path, **options) as llm:
    assert_scores(llm.score(c.prompts), c.logprobs)
    assert_greedy(llm.generate(c.prompts, params), c.tokens, NEW_TOKENS)


def test_checkpoint_without_tokenizer(tmp_path):
  """`save_pretrained` writes none; lists of ids need none."""
  model = make_checkpoint(tmp_path)
  prompt = [5, 6, 7]
  with flexjax.load(str(tmp_path), dtype='float32') as llm:
    [score] = llm.score([prompt])
    expected = logits_of(model, prompt).log_softmax(-1)[[0, 1], prompt[1:]]
    np.testing.assert_allclose(score.logprobs[1:], expected, atol=TOLERANCE)
    with pytest.raises(flexjax.InputError, match='tokenizer'):
      llm.generate(['text'])
