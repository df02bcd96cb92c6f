"""Completions against logits of transformers, and against LLM.generate."""

import dataclasses
import random

import numpy as np
import pytest

import flexjax
from flexjax.apps.completions import Asked, complete
from flexjax.config import SamplingParams
from flexjax.errors import InputError
from tests.apps.completed import (
  PROMPT,
  TOLERANCE,
  check_lists,
  logprobs_of,
  one,
)


@pytest.mark.parametrize('k', [0, 1, 5])
@pytest.mark.parametrize('echo', [False, True], ids=['plain', 'echo'])
def test_logprobs(llm, reference, k, echo):
  choice = one(
    llm, logprobs=k, echo=echo, max_new_tokens=12, temperature=1.5, seed=5
  )
  prompt = llm.tokenizer.encode(PROMPT)
  ids = choice.token_ids if echo else prompt + choice.token_ids
  assert ids[: len(prompt)] == prompt
  check_lists(choice)
  assert choice.text.startswith(PROMPT) == echo
  assert choice.prompt_tokens == len(prompt)
  assert choice.completion_tokens == len(ids) - len(prompt) == 12
  expected = logprobs_of(reference, ids)
  begin = 0 if echo else len(prompt)
  chosen_in_top = 0
  for n, at in enumerate(range(begin, len(ids))):
    if not at:
      assert choice.token_logprobs[n] is None
      continue
    row = expected[at - 1]
    top = choice.top_logprobs[n]
    assert choice.token_logprobs[n] == pytest.approx(
      row[ids[at]], abs=TOLERANCE
    )
    best = np.sort(row)[::-1][:k].tolist()
    found = sorted(top.values(), reverse=True)
    if row[ids[at]] < min(best, default=0) - TOLERANCE:
      assert found.pop() == choice.token_logprobs[n]
    elif k:
      chosen_in_top += 1
    else:
      found.pop()
    assert found == pytest.approx(best, abs=TOLERANCE)
    if k:
      likeliest = int(row.argmax())
      name = max(top, key=top.get)
      if likeliest != ids[at]:
        text = llm.tokenizer.decode([likeliest])
        assert name in (text, llm.tokenizer.spell(likeliest))
  assert not k or 0 < chosen_in_top < len(ids) - begin


def test_only_those_pay_who_ask(llm, monkeypatch):
  scored = []
  score = llm.score

  def counted(texts, top=0):
    scored.append((len(texts), top))
    return score(texts, top)

  monkeypatch.setattr(llm, 'score', counted)
  params = SamplingParams(max_new_tokens=2)
  plain = Asked(prompt=PROMPT, params=params)
  asks = Asked(prompt=PROMPT, params=params, logprobs=0, n=3)
  [[a], [b, *_], [c]] = complete(llm, [plain, asks, plain])
  assert scored == [(1, 0)]
  assert a.tokens is c.tokens is a.token_logprobs is a.top_logprobs is None
  assert a.text_offset is None
  check_lists(b)
  assert a.text == b.text == c.text
  complete(llm, [plain, dataclasses.replace(asks, logprobs=2)])
  assert scored[1:] == [(1, 5)]
  complete(llm, [plain])
  assert len(scored) == 2


def test_several_completions(llm):
  options = {'n': 4, 'max_new_tokens': 12, 'temperature': 1.0}
  choices = one(llm, seed=7, logprobs=1, **options)
  texts = [c.text for c in choices]
  assert len(set(texts)) == 4
  for choice in choices:
    check_lists(choice)
  assert [c.text for c in one(llm, seed=7, **options)] == texts
  assert [c.text for c in one(llm, seed=8, **options)] != texts
  first = llm.generate(
    [PROMPT], SamplingParams(max_new_tokens=12, temperature=1.0, seed=7)
  )
  assert first[0].text == texts[0]
  assert len({c.text for c in one(llm, **options)}) == 4
  big = one(llm, seed=2**32 - 1, **options)
  assert len({c.text for c in big}) == 4


def test_greedy_completions_are_equal(llm):
  a, b, c = one(llm, n=3, max_new_tokens=8, seed=3, logprobs=1)
  assert a == b == c
  [expected] = llm.generate([PROMPT], SamplingParams(max_new_tokens=8))
  assert a.text == expected.text
  assert a.finish_reason == 'length'


def test_requests_do_not_mix(llm):
  asked = [
    Asked(prompt='import os', params=SamplingParams(max_new_tokens=3)),
    Asked(
      prompt=[2, 30, 31],
      params=SamplingParams(max_new_tokens=5, temperature=1.0, seed=1),
      n=2,
      logprobs=2,
    ),
    Asked(prompt='x = 1', params=None, echo=True, logprobs=1),
    Asked(
      prompt='class A',
      params=SamplingParams(max_new_tokens=4),
      logprobs=0,
      echo=True,
    ),
  ]
  together = complete(llm, asked)
  apart = [complete(llm, [a])[0] for a in asked]
  assert [len(choices) for choices in together] == [1, 2, 1, 1]
  for choices, alone in zip(together, apart, strict=True):
    for a, b in zip(choices, alone, strict=True):
      assert (a.text, a.token_ids, a.tokens) == (b.text, b.token_ids, b.tokens)
      if a.tokens is not None:
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-4)
        assert [top and list(top) for top in a.top_logprobs] == [
          top and list(top) for top in b.top_logprobs
        ]


def test_no_new_tokens(llm, reference):
  asked = Asked(prompt=PROMPT, params=None, echo=True, logprobs=1)
  [[choice]] = complete(llm, [asked])
  ids = llm.tokenizer.encode(PROMPT)
  assert choice.text == PROMPT
  assert (choice.token_ids, choice.completion_tokens) == (ids, 0)
  assert choice.finish_reason == 'length'
  check_lists(choice)
  row = logprobs_of(reference, ids)
  expected = row[range(len(ids) - 1), ids[1:]]
  assert choice.token_logprobs[1:] == pytest.approx(expected, abs=TOLERANCE)
  silent = dataclasses.replace(asked, echo=False, n=2)
  [choices] = complete(llm, [silent])
  assert [c.text for c in choices] == ['', '']
  assert choices[0].tokens == choices[0].token_logprobs == []


def test_a_prompt_that_fills_the_context(llm):
  size = llm.config.max_positions
  asked = Asked(prompt=[2, *[9] * (size - 1)], params=None, echo=True)
  [[choice]] = complete(llm, [asked])
  assert choice.prompt_tokens == size
  with pytest.raises(InputError, match=f'text 1 has {size + 1} tokens'):
    complete(llm, [asked, dataclasses.replace(asked, prompt=[9] * (size + 1))])


def test_a_truncated_prompt(llm):
  size = llm.config.max_positions
  ids = [2, *random.Random(0).choices(range(300, 400), k=size)]
  choice = one(
    llm, ids, max_new_tokens=2, truncate_prompt=True, echo=True, logprobs=0
  )
  assert choice.prompt_tokens == size - 2
  assert choice.token_ids[: size - 2] == [2, *ids[4:]]
  assert len(choice.tokens) == size
  check_lists(choice)


def test_characters_of_several_tokens(llm):
  prompt = 'x = "\N{SNOWMAN}\N{GRINNING FACE}é"  # 日本'
  asked = Asked(prompt=prompt, params=None, echo=True, logprobs=5)
  [[choice]] = complete(llm, [asked])
  assert choice.text == prompt
  check_lists(choice)
  assert '' in choice.tokens[1:]  # one that ends within a character
  sizes = {len(top) for top in choice.top_logprobs[1:]}
  assert sizes <= {5, 6}  # no name is taken twice


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'n': 0}, 'n must be an integer of at least 1, got 0'),
    ({'n': True}, 'n must be'),
    ({'logprobs': 6}, 'logprobs must be an integer from 0 to 5, got 6'),
    ({'logprobs': -1}, 'logprobs must be'),
    ({'logprobs': True}, 'logprobs must be'),
  ],
)
def test_refused(changes, message):
  with pytest.raises(InputError, match=message):
    Asked(prompt='a', **changes)


def test_bad_prompts_are_named(llm):
  good = Asked(prompt='a', n=3)
  with pytest.raises(InputError, match='prompt 2 is empty'):
    complete(llm, [good, good, Asked(prompt=[])])
  with pytest.raises(InputError, match='there are no prompts'):
    complete(llm, [])


def test_without_a_tokenizer():
  with flexjax.load(
    'opt-125m', random_weights=True, dtype='float32', batch_size=1
  ) as llm:
    asked = Asked(prompt=[5], params=None, logprobs=0)
    with pytest.raises(InputError, match='no tokenizer'):
      complete(llm, [asked])
