"""LLM.score's likeliest tokens against logits of transformers."""

import random

import numpy as np
import pytest

import flexjax
from flexjax.errors import InputError
from flexjax.policy import volume
from tests.apps.completed import TOLERANCE, logprobs_of


def test_score_names_the_likeliest(llm, reference):
  texts = [[2, 30, 40, 50, 60], [2], [2, 9, 8, 7, 6, 5, 4, 3]] * 3
  scores = llm.score(texts, top=7)
  plain = llm.score(texts)
  for score, bare, ids in zip(scores, plain, texts, strict=True):
    assert bare.top == []
    assert score.top[0] is None
    assert score.logprobs == pytest.approx(bare.logprobs, abs=1e-6)
    assert score.greedy == bare.greedy
    assert len(score.top) == len(ids)
    expected = logprobs_of(reference, ids)
    for row, top in zip(expected[:-1], score.top[1:], strict=True):
      assert [n for n, _ in top] == np.argsort(-row)[:7].tolist()
      best = np.sort(row)[::-1][:7]
      assert [x for _, x in top] == pytest.approx(best, abs=TOLERANCE)
  assert [s.greedy[1:] for s in scores] == [
    [top[0][0] == t for top, t in zip(s.top[1:], s.token_ids[1:], strict=True)]
    for s in scores
  ]


def test_a_large_batch_goes_through_the_head_in_parts(
  llm, reference, monkeypatch
):
  """Two positions of the logits at a time, as with a large vocabulary."""
  size = 4 * llm.config.vocab_size
  monkeypatch.setattr(volume, 'SCORED_BYTES', 4 * size)
  ids = [2, *random.Random(0).sample(range(3, 4000), 10)]
  with flexjax.load(dtype='float32', batch_size=1) as small:
    [score] = small.score([ids], top=3)
  expected = logprobs_of(reference, ids)
  for row, top in zip(expected[:-1], score.top[1:], strict=True):
    assert [n for n, _ in top] == np.argsort(-row)[:3].tolist()


def test_top_is_compiled_once(llm):
  llm.score([[2, 5, 6]], top=5)
  llm.score([[2, 5, 6]])
  compiled = llm.stats.compilations
  llm.score([[2, 8, 9]], top=5)
  llm.score([[2, 8, 9]], top=0)
  assert llm.stats.compilations == compiled


@pytest.mark.parametrize('top', [-1, 4097, 1.0])
def test_top_out_of_range(llm, top):
  with pytest.raises(InputError, match='top must be between 0 and 4096'):
    llm.score([[2, 5]], top=top)
