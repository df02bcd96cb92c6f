"""Completions with log-probabilities: what OpenAI's /v1/completions returns.

Hides how token ids become strings, and that log-probabilities come from a
second pass over prompt and completion, which only those pay for who ask.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from flexjax.config import SamplingParams
from flexjax.data.tokenizer import UNKNOWN, Tokenizer
from flexjax.errors import InputError
from flexjax.runtime.generate import Output
from flexjax.runtime.llm import LLM
from flexjax.runtime.prompts import Prompt
from flexjax.runtime.scores import Score

MOST_LOGPROBS = 5
_REASONS = {'eos': 'stop', 'stop': 'stop', 'length': 'length'}
_UNKNOWN = (
  '\N{REPLACEMENT CHARACTER}'  # a decoder's word for a part of a character
)
# Odd, so that its multiples modulo 2**32 are all different.
_SEED_STEP = 0x9E3779B9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """One request for completions.

  Attributes:
    prompt: text, or token ids.
    params: how to continue it; None for no new token at all, which leaves the
      prompt to be echoed.
    n: how many completions. The first is the one that `LLM.generate` gives;
      the others draw from seeds that are derived from `params.seed`, or, where
      that is None, by their place in the call. Without temperature they are
      all equal.
    logprobs: how many of the likeliest tokens to name in each token's place,
      0 to 5; None for no log-probabilities at all.
    echo: text and tokens begin with the prompt's.
  """

  prompt: Prompt
  params: SamplingParams | None = dataclasses.field(
    default_factory=SamplingParams
  )
  n: int = 1
  logprobs: int | None = None
  echo: bool = False

  def __post_init__(self) -> None:
    if not _is_int(self.n) or self.n < 1:
      raise InputError(f'n must be an integer of at least 1, got {self.n!r}')
    k = self.logprobs
    if k is not None and not (_is_int(k) and 0 <= k <= MOST_LOGPROBS):
      raise InputError(
        f'logprobs must be an integer from 0 to {MOST_LOGPROBS}, got {k!r}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """One completion.

  The last four are None unless log-probabilities are asked for. Else they are
  of one length: an entry for each token that has a part in `text`, in the
  order of `token_ids`. What a stop string cut away is left out, and so is the
  eos or stop id that ended the text.

  Attributes:
    text: what was generated, after the prompt's text if that is echoed,
      without special tokens, cut before a stop string.
    finish_reason: 'stop' (eos, a stop id or a stop string) or 'length'.
    token_ids: every generated id, an ending eos or stop id included, after
      the prompt's if these are echoed.
    prompt_tokens, completion_tokens: how many tokens the prompt has, and how
      many were generated.
    tokens: the text of each; joined they are `text`. A character that several
      tokens make belongs to the last of them, the others have ''; so have
      special tokens.
    token_logprobs: natural logarithm of each token's probability given those
      before it; None for a prompt's first.
    top_logprobs: token to log-probability, the likeliest ones in each place
      and the token that stands there, which goes by its text in `tokens`; None
      for a prompt's first. Another that has no text of its own, or the same as
      a likelier one, is named as the vocabulary writes it.
    text_offset: where each one's text begins, in characters of `text`.
  """

  text: str
  finish_reason: str
  token_ids: list[int]
  prompt_tokens: int
  completion_tokens: int
  tokens: list[str] | None = None
  token_logprobs: list[float | None] | None = None
  top_logprobs: list[dict[str, float] | None] | None = None
  text_offset: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class _Draft:
  """A completion before its log-probabilities are known.

  Attributes:
    prompt: the prompt's ids, as the model saw them.
    output: what was generated; None where nothing was to be.
    tokens: text of each token that the choice lists, the prompt's first.
    scored: ids up to the last of them, from the beginning of the prompt.
  """

  asked: Asked
  prompt: list[int]
  output: Output | None
  tokens: list[str]
  scored: list[int]


def complete(
  llm: LLM, asked: Sequence[Asked], *, least: tuple[int, int] = (0, 0)
) -> list[list[Choice]]:
  """Completes every prompt; returns the `n` choices of each, in order.

  Args:
    least: see `LLM.generate`.

  Raises:
    InputError: a prompt is not valid or too long, or log-probabilities are
      asked of a model without a tokenizer; nothing has been generated then.
  """
  if llm.tokenizer is None and any(a.logprobs is not None for a in asked):
    raise InputError(
      'log-probabilities are listed by text: the model has no tokenizer'
    )
  prompts = llm.encode(
    [a.prompt for a in asked],
    [a.params or SamplingParams() for a in asked],
    [a.params.max_new_tokens if a.params else 0 for a in asked],
  )
  drafts = _generate(llm, asked, prompts, least)
  scores = _score(llm, [draft for group in drafts for draft in group])
  choices = []
  for a, group in zip(asked, drafts, strict=True):
    made = [_choice(llm.tokenizer, d, next(scores)) for d in group]
    choices.append(made if len(made) == a.n else made * a.n)
  return choices


def _generate(
  llm: LLM,
  asked: Sequence[Asked],
  prompts: Sequence[list[int]],
  least: tuple[int, int],
) -> list[list[_Draft]]:
  """Returns the drafts of each; one for all where they would be equal."""
  params = [_params(a) for a in asked]
  work = [(i, p) for i, ps in zip(prompts, params, strict=True) for p in ps]
  ids, each = [i for i, _ in work], [p for _, p in work]
  outputs = iter(llm.generate(ids, each, least=least) if work else [])
  drafts = []
  for a, prompt, mine in zip(asked, prompts, params, strict=True):
    found: list[Output | None] = [next(outputs) for _ in mine]
    drafts.append(
      [_draft(llm.tokenizer, a, prompt, out) for out in found or [None]]
    )
  return drafts


def _params(asked: Asked) -> list[SamplingParams]:
  """Returns those of each completion that is to be generated by itself."""
  p = asked.params
  if p is None:
    return []
  if not p.temperature:
    return [p]
  if p.seed is None:
    return [p] * asked.n
  return [
    dataclasses.replace(p, seed=(p.seed + k * _SEED_STEP) % 2**32)
    for k in range(asked.n)
  ]


def _draft(
  tokenizer: Tokenizer | None,
  asked: Asked,
  prompt: list[int],
  output: Output | None,
) -> _Draft:
  tokens: list[str] = []
  if tokenizer is not None and asked.logprobs is not None:
    if asked.echo:
      tokens += tokenizer.pieces(prompt)
    if output is not None:
      tokens += _kept(tokenizer, asked, output)
  generated = output.token_ids if output else []
  size = len(tokens) + (0 if asked.echo else len(prompt))
  return _Draft(asked, prompt, output, tokens, [*prompt, *generated][:size])


def _kept(tokenizer: Tokenizer, asked: Asked, output: Output) -> list[str]:
  """Returns the text of each generated token that has a part in the text."""
  assert asked.params is not None
  ids, last = output.token_ids, output.token_ids[-1]
  if output.finish_reason == 'length':
    return tokenizer.pieces(ids)
  if output.finish_reason == 'eos' or last in asked.params.stop_token_ids:
    return tokenizer.pieces(ids[:-1])
  kept, left = [], len(output.text)
  for piece in tokenizer.pieces(ids):
    if not left:
      break
    kept.append(piece[:left])
    left -= len(kept[-1])
  return kept


def _score(llm: LLM, drafts: Sequence[_Draft]) -> Iterator[Score | None]:
  """Returns a score for each draft that lists tokens; None for the others."""
  listed = [d for d in drafts if d.tokens]
  # One number of alternatives for all: each has to be compiled for.
  top = MOST_LOGPROBS if any(d.asked.logprobs for d in listed) else 0
  top = min(top, llm.config.vocab_size)
  scores = iter(llm.score([d.scored for d in listed], top) if listed else [])
  return iter([next(scores) if d.tokens else None for d in drafts])


def _choice(
  tokenizer: Tokenizer | None, draft: _Draft, score: Score | None
) -> Choice:
  asked, output = draft.asked, draft.output
  lead = draft.prompt if asked.echo else []
  text = tokenizer.decode(lead) if tokenizer and lead else ''
  generated = output.token_ids if output else []
  listed: dict[str, Any] = {}
  if asked.logprobs is not None:
    assert tokenizer is not None
    listed = _lists(tokenizer, draft, score)
  return Choice(
    text=text + (output.text if output else ''),
    finish_reason=_REASONS[output.finish_reason] if output else 'length',
    token_ids=[*lead, *generated],
    prompt_tokens=len(draft.prompt),
    completion_tokens=len(generated),
    **listed,
  )


def _lists(
  tokenizer: Tokenizer, draft: _Draft, score: Score | None
) -> dict[str, Any]:
  """Returns what a choice has for each token that it lists."""
  tokens = draft.tokens
  listed = slice(len(draft.scored) - len(tokens), None)
  logprobs = score.logprobs[listed] if score else []
  likeliest = score.top[listed] if score else []
  return {
    'tokens': tokens,
    'token_logprobs': logprobs,
    'top_logprobs': [
      None
      if logprob is None
      else _named(
        tokenizer, token, text, logprob, (best or [])[: draft.asked.logprobs]
      )
      for token, text, logprob, best in zip(
        draft.scored[listed],
        tokens,
        logprobs,
        likeliest or [None] * len(tokens),
        strict=True,
      )
    ],
    'text_offset': [*itertools.accumulate(map(len, tokens), initial=0)][:-1],
  }


def _named(
  tokenizer: Tokenizer,
  token: int,
  text: str,
  logprob: float,
  likeliest: Sequence[tuple[int, float]],
) -> dict[str, float]:
  """Names the likeliest tokens in a place, and the one that stands there.

  Args:
    token, text, logprob: of the one that stands there.
  """
  named: dict[str, float] = {}
  for other, value in likeliest:
    name = text
    if other != token:
      name = tokenizer.decode([other])
      if not name or UNKNOWN in name or name in named or name == text:
        name = tokenizer.spell(other)
    named.setdefault(name, value)
  named[text] = logprob
  return named


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
