"""Windows, last words, and figures that are worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.data.tokenizer import Tokenizer
from flexjax.errors import InputError
from flexjax.runtime import evaluate
from flexjax.runtime.evaluate import Example
from flexjax.runtime.scores import Score
from flexjax.runtime.sources import BUNDLED

BOS = 2


@st.composite
def cuts(draw):
  leading = draw(st.sampled_from([[], [BOS]]))
  window = draw(st.integers(2, 40))
  stride = draw(st.integers(1, window - 1))
  return draw(st.integers(0, 200)), leading, window, stride


@given(cuts())
def test_every_token_counts_once(cut):
  size, leading, window, stride = cut
  ids = list(range(1000, 1000 + size))
  examples = evaluate.windows(ids, leading, window, stride)
  seen = []
  for n, example in enumerate(examples):
    assert example.ids[: len(leading)] == leading
    assert len(example.ids) <= window
    assert 1 <= example.counted < len(example.ids)
    own = example.ids[len(leading) :]
    assert own == ids[n * stride : n * stride + len(own)]
    first = len(example.ids) - example.counted  # tokens before it
    position = len(leading) + example.ids[first] - 1000
    assert first >= min(position, window - stride)
    seen += example.ids[first:]
  assert seen == ids[1 - len(leading) :]


def test_windows():
  ids = [10, 11, 12, 13, 14, 15]
  assert evaluate.windows(ids, [], 4, 2) == [
    Example([10, 11, 12, 13], 3),
    Example([12, 13, 14, 15], 2),
  ]
  assert evaluate.windows(ids, [BOS], 4, 2) == [
    Example([BOS, 10, 11, 12], 3),
    Example([BOS, 12, 13, 14], 2),
    Example([BOS, 14, 15], 1),
  ]
  assert evaluate.windows(ids, [BOS], 4, 3) == [
    Example([BOS, 10, 11, 12], 3),
    Example([BOS, 13, 14, 15], 3),
  ]
  assert evaluate.windows(ids, [BOS], 100, 50) == [Example([BOS, *ids], 6)]
  assert evaluate.windows([10], [BOS], 4, 2) == [Example([BOS, 10], 1)]
  assert evaluate.windows([10], [], 4, 2) == []
  assert evaluate.windows([], [BOS], 4, 2) == []


@pytest.mark.parametrize('leading', [[], [BOS]], ids=['plain', 'bos'])
def test_windows_of_a_text(leading):
  def cut(text, *sizes):
    return evaluate.text_windows(text, Letters(leading), 8, *sizes)

  ids = list(map(ord, 'abcdefghijkl'))
  text = 'abcdefghijkl'
  assert cut(text) == evaluate.windows(ids, leading, 8, 4)
  assert cut(text, 5) == evaluate.windows(ids, leading, 5, 2)
  assert cut(text, 2) == evaluate.windows(ids, leading, 2, 1)
  assert cut(text, None, 7) == evaluate.windows(ids, leading, 8, 7)
  for sizes in ((1,), (9,), (0,), (8, 0), (8, 8), (4, 4), (4, -1)):
    with pytest.raises(InputError, match=r'(window|stride) must be between'):
      cut(text, *sizes)
  assert len(cut('ab')) == 1
  with pytest.raises(InputError, match=f'got {len(leading)}$'):
    cut('')
  if not leading:
    with pytest.raises(InputError, match=r'got 1$'):
      cut('a')


WORDS = {
  'one space': ('import sys, os', ' os'),
  'several': ('import sys,  \t os', '  \t os'),
  'newline': ('import sys\nimport', '\nimport'),
  'whitespace at the end': ('import os\n \n', ' os'),
  'whitespace at the beginning': (' import os', ' os'),
  'punctuation': ('return self._value[0]', ' self._value[0]'),
  'not a space alone': ('a\u3000b', '\u3000b'),
}


@pytest.mark.parametrize(('text', 'word'), WORDS.values(), ids=WORDS)
def test_last_word(text, word):
  tokenizer = Tokenizer.open(BUNDLED)
  example = evaluate.last_word(text, tokenizer, 99)
  assert example.ids == tokenizer.encode(text.rstrip())
  assert tokenizer.decode(example.ids[-example.counted :]) == word


class Letters:
  """Ids are those of characters, but 'c de' is one token."""

  def __init__(self, leading):
    self.leading = leading

  def encode(self, text, leading=True):
    ids = self.leading if leading else []
    return [*ids, *map(ord, text.replace('c de', '#').replace(' ', ''))]


@pytest.mark.parametrize('leading', [[], [BOS]], ids=['plain', 'bos'])
def test_last_word_whose_tokens_reach_back(leading):
  example = evaluate.last_word('ab c de', Letters(leading), 9)
  assert example == Example([*leading, *map(ord, 'abcde')], 2)
  example = evaluate.last_word('ab c d', Letters(leading), 9)
  assert example == Example([*leading, *map(ord, 'abcd')], 1)
  with pytest.raises(InputError, match=r'tokens.*context.*\b3$'):
    evaluate.last_word('ab c d', Letters(leading), 3)


@pytest.mark.parametrize('text', ['', ' \n', 'word', ' word', 'word\n'])
def test_no_two_words(text):
  with pytest.raises(InputError, match='two words'):
    evaluate.last_word(text, Tokenizer.open(BUNDLED), 99)


def test_words_of_no_tokens():
  class Nothing:
    def encode(self, text, leading=True):
      return [BOS] * leading

  with pytest.raises(InputError, match='no tokens'):
    evaluate.last_word('a b', Nothing(), 9)


def score(n, *pairs):
  """Makes a score of (probability, greedy) of each token but the first."""
  logprobs = [math.log(p) for p, _ in pairs]
  greedy = [g for _, g in pairs]
  return Score(n, [5] * (len(pairs) + 1), [None, *logprobs], [None, *greedy])


def test_perplexity():
  scores = [
    score(0, (1 / 2, True), (1 / 8, False)),
    score(1, (1 / 99, False), (1 / 32, False)),
  ]
  examples = [Example([5] * 3, 2), Example([5] * 3, 1)]
  assert evaluate.perplexity(examples, scores, 18) == {
    'perplexity': pytest.approx(8),
    'nll': pytest.approx(math.log(8)),
    'tokens': 3,
    'bits_per_byte': pytest.approx(9 / 18),
  }


def test_last_token():
  scores = [
    score(0, (1 / 99, False), (1 / 2, True), (1 / 4, True)),
    score(1, (1 / 99, True), (1 / 2, True), (1 / 16, False)),
    score(2, (1 / 99, True), (1 / 99, True), (1 / 2, True)),
  ]
  examples = [Example([5] * 4, counted) for counted in (2, 2, 1)]
  assert evaluate.last_token(examples, scores) == {
    'accuracy': pytest.approx(2 / 3),
    'perplexity': pytest.approx(2 ** ((3 + 5 + 1) / 3)),
    'examples': 3,
  }


def test_beyond_what_a_float_holds():
  scores = [score(0, *[(1e-200, False)] * 2)]
  figures = evaluate.last_token([Example([5] * 3, 2)], scores)
  assert figures['perplexity'] == math.inf
