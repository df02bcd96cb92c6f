"""What a model is measured on, and what its scores come to.

Pure: texts or ids -> examples, to be scored by `LLM.score`; examples and their
scores -> figures.
"""

import dataclasses
import math
from collections.abc import Sequence

from flexjax.data.tokenizer import Tokenizer
from flexjax.errors import InputError
from flexjax.runtime.scores import Score


@dataclasses.dataclass(frozen=True)
class Example:
  """Token ids, of which the last `counted` are to be predicted."""

  ids: list[int]
  counted: int


def text_windows(
  text: str,
  tokenizer: Tokenizer,
  context: int,
  window: int | None = None,
  stride: int | None = None,
) -> list[Example]:
  """Cuts a text as `windows` does.

  Args:
    context: the longest window.
    window, stride: default the context, and half of the window.

  Raises:
    InputError: `window` or `stride` is out of range, or no token counts.
  """
  leading = tokenizer.encode('')
  window = context if window is None else window
  if not 2 <= window <= context:
    raise InputError(
      f'window must be between 2 and {context}, the context, got {window}'
    )
  stride = window // 2 if stride is None else stride
  most = window - max(1, len(leading))  # some token comes before any other
  if not 1 <= stride <= most:
    raise InputError(
      f'stride must be between 1 and {most} in windows of {window}, got '
      f'{stride}'
    )
  ids = tokenizer.encode(text, leading=False)
  examples = windows(ids, leading, window, stride)
  if not examples:
    raise InputError(
      'a text must have at least 2 tokens, the leading one included, got '
      f'{len(leading) + len(ids)}'
    )
  return examples


def windows(
  ids: Sequence[int], leading: Sequence[int], window: int, stride: int
) -> list[Example]:
  """Cuts a text into windows that overlap.

  A window starts `stride` tokens after the one before it, and only what no
  earlier window holds counts. Every token counts once, but for the very first
  where nothing leads it; each has at least `window - stride` tokens before it,
  or all there are.

  Args:
    ids: the text's tokens, without those that lead it.
    leading: what stands at the beginning of every window and takes its place
      there, but never counts.
    window: tokens in a window, at most.
    stride: at least 1, below `window`, and with `leading` no more than it
      leaves of a window.
  """
  room = window - len(leading)
  counted = 0 if leading else 1  # tokens that are dealt with
  examples = []
  for begin in range(0, len(ids), stride):
    end = min(begin + room, len(ids))
    if end > counted:
      examples.append(Example([*leading, *ids[begin:end]], end - counted))
      counted = end
  return examples


def last_word(text: str, tokenizer: Tokenizer, context: int) -> Example:
  """Cuts a text before its last word; whitespace before it is part of it.

  Whitespace at the end is left out. The word's tokens are those by which the
  whole text's go on after those of what is before it. Where these differ,
  both are tokenised by themselves.

  Args:
    context: how many tokens there may be.

  Raises:
    InputError: there are not two words, or no tokens of them, or too many.
  """
  text = text.rstrip()
  parts = text.rsplit(maxsplit=1)
  if len(parts) < 2:
    raise InputError("'text' must have at least two words")
  given = tokenizer.encode(parts[0])
  ids = tokenizer.encode(text)
  if ids[: len(given)] != given:
    word = text[len(parts[0]) :]
    ids = given + tokenizer.encode(word, leading=False)
  if not 0 < len(given) < len(ids):
    raise InputError('the tokenizer makes no tokens of the words')
  if len(ids) > context:
    raise InputError(
      f"'text' has {len(ids)} tokens; the context holds {context}"
    )
  return Example(ids, len(ids) - len(given))


def perplexity(
  examples: Sequence[Example], scores: Sequence[Score], nbytes: int
) -> dict[str, float]:
  """Returns the figures of a text of `nbytes` bytes, keyed by name."""
  tokens = sum(example.counted for example in examples)
  total = -math.fsum(map(_logprob, examples, scores))
  return {
    'perplexity': _exp(total / tokens),
    'nll': total / tokens,
    'tokens': tokens,
    'bits_per_byte': total / math.log(2) / nbytes,
  }


def last_token(
  examples: Sequence[Example], scores: Sequence[Score]
) -> dict[str, float]:
  """Returns the figures of last words, keyed by name.

  A word is right where all of its tokens are greedy. The perplexity is of
  words, not of tokens.
  """
  count = len(examples)
  right = sum(
    all(score.greedy[-example.counted :])
    for example, score in zip(examples, scores, strict=True)
  )
  total = -math.fsum(map(_logprob, examples, scores))
  return {
    'accuracy': right / count,
    'perplexity': _exp(total / count),
    'examples': count,
  }


def _logprob(example: Example, score: Score) -> float:
  """Returns the log-probability of all that counts."""
  return math.fsum(x or 0.0 for x in score.logprobs[-example.counted :])


def _exp(x: float) -> float:
  try:
    return math.exp(x)
  except OverflowError:
    return math.inf
