"""Completions that end early: their text, their tokens, their reasons."""

import dataclasses

import pytest

from flexjax.apps.completions import Asked, complete
from flexjax.config import SamplingParams
from tests.apps.completed import (
  PROMPT,
  TOLERANCE,
  check_lists,
  logprobs_of,
  one,
)


def stops(llm, count):
  """Greedy text, and stop strings that begin and end within its tokens."""
  text = one(llm, max_new_tokens=24).text
  found = [text[n : n + 3] for n in range(1, len(text) - 3)]
  return text, list(dict.fromkeys(found))[:count]


def test_stop_strings(llm, reference):
  full, strings = stops(llm, 12)
  prompt = llm.tokenizer.encode(PROMPT)
  asked = [
    Asked(
      prompt=PROMPT,
      params=SamplingParams(max_new_tokens=24, stop=(stop,)),
      logprobs=1,
      echo=echo,
    )
    for stop in strings
    for echo in (False, True)
  ]
  inside = 0
  for a, [choice] in zip(asked, complete(llm, asked), strict=True):
    [stop] = a.params.stop
    expected = full[: full.index(stop)]
    assert choice.text == (PROMPT if a.echo else '') + expected
    assert choice.finish_reason == 'stop'
    check_lists(choice)
    generated = choice.token_ids[len(prompt) if a.echo else 0 :]
    assert choice.completion_tokens == len(generated)
    assert stop in llm.tokenizer.decode(generated)
    ids = prompt + generated
    begin = 0 if a.echo else len(prompt)
    rows = logprobs_of(reference, ids)
    for n, value in enumerate(choice.token_logprobs, begin):
      if n:
        assert value == pytest.approx(rows[n - 1, ids[n]], abs=TOLERANCE)
    if choice.tokens and choice.tokens[-1]:
      whole = llm.tokenizer.decode([ids[begin + len(choice.tokens) - 1]])
      inside += choice.tokens[-1] != whole
  assert inside  # some stop string began within a token


def test_stop_string_at_once(llm):
  full = one(llm, max_new_tokens=4).text
  choice = one(llm, max_new_tokens=4, stop=full[:2], logprobs=2)
  assert (choice.text, choice.finish_reason) == ('', 'stop')
  assert choice.tokens == choice.top_logprobs == choice.text_offset == []
  assert choice.completion_tokens > 0


def test_stop_ids_leave_no_trace(llm):
  ids = one(llm, max_new_tokens=6).token_ids
  stop = ids[3]
  first = ids.index(stop)
  choice = one(llm, max_new_tokens=6, stop_token_ids=(stop,), logprobs=0)
  assert choice.token_ids == ids[: first + 1]
  assert choice.finish_reason == 'stop'
  assert len(choice.tokens) == first
  check_lists(choice)


def test_eos_counts_as_stop(llm, monkeypatch):
  ids = one(llm, max_new_tokens=6).token_ids
  config = dataclasses.replace(llm.config, eos_id=ids[2])
  monkeypatch.setattr(llm, 'config', config)
  choice = one(llm, max_new_tokens=6, logprobs=0)
  first = ids.index(ids[2])
  assert choice.finish_reason == 'stop'
  assert choice.token_ids == ids[: first + 1]
  assert len(choice.tokens) == first
