"""A job: a file of requests, however long, to a file of results.

The input goes by in windows of so many lines; a window's requests are sorted by
length and run in blocks of one size and few shapes. Which requests share a
block depends on the input and the block's size alone, so that a job that was
stopped at any moment goes on with the same blocks, and ends with the same
results.
"""

import bisect
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexjax.apps import inputs, requests
from flexjax.apps.completions import Asked, Choice, complete
from flexjax.apps.journal import Journal
from flexjax.config import SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.llm import LLM

# Columns of blocks: few, and at most half as much again as is needed.
_LADDER = sorted(n for p in range(3, 13) for n in (2**p, 3 * 2 ** (p - 1)))
_STEPS = tuple(2**n for n in range(13))  # new tokens likewise
_ENOUGH = 0.9  # of the best throughput, for blocks that are small
# A request and its choices, of which one that is refused has none.
Answer = tuple[requests.Asked, list[Choice]]


@dataclasses.dataclass(kw_only=True)
class Figures:
  """What a job has done so far, over all of its runs.

  Attributes:
    answered, failed: requests.
    prompt_tokens, new_tokens: of what was answered.
    padded_tokens: columns of blocks, for prompts and new tokens.
    engine_seconds: in which blocks ran; `seconds` is all time.
    shapes: (prompt, new) columns of blocks -> blocks.
  """

  answered: int = 0
  failed: int = 0
  prompt_tokens: int = 0
  new_tokens: int = 0
  padded_tokens: int = 0
  engine_seconds: float = 0.0
  seconds: float = 0.0
  shapes: dict[str, int] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns plain numbers, with what follows from them."""
    useful = self.prompt_tokens + self.new_tokens
    waste = 1 - useful / self.padded_tokens if self.padded_tokens else 0.0
    seconds = self.seconds
    return dataclasses.asdict(self) | {
      'padding_waste': waste,
      'new_tokens_per_s': self.new_tokens / seconds if seconds else 0.0,
      'useful_tokens_per_s': useful / seconds if seconds else 0.0,
      'overhead': 1 - self.engine_seconds / seconds if seconds else 0.0,
    }


class Job:
  """One job.

  Args:
    path: of the input.
    default: of plain lines, for what they leave out.
    ordered: results in the order of the input, a window at a time.
    on_block: called after every block.

  What is committed holds `form`: dtype, bits and place of attention that were
  settled by the first block, which a run that goes on must take: where they
  differ, so may results.

  Attributes:
    figures: what has been done.
    stopping: set by whoever wants the job to end after the block at hand.
  """

  def __init__(
    self,
    llm: LLM,
    path: Path,
    journal: Journal,
    *,
    default: SamplingParams,
    ordered: bool = False,
    on_block: Callable[[], None] = lambda: None,
  ):
    self.llm, self.path, self.journal = llm, path, journal
    self.default, self.ordered, self.on_block = default, ordered, on_block
    self.stopping = False
    done = journal.done or {
      'window': 0,
      'steps': 0,
      'sizes': {},
      'form': None,
    }
    self._window, self._steps = done['window'], done['steps']
    self._sizes: dict[str, list[int]] = done['sizes']
    self._form: dict[str, Any] | None = done['form']
    self.figures = Figures(**done.get('figures', {}))
    self._written: Future
    self._before = self.figures.seconds
    self._began = time.perf_counter()

  def run(self) -> bool:
    """Answers what is not answered yet; returns whether all of it is.

    The next window is read, and the last block written, by threads: the model
    waits for neither.
    """
    windows = enumerate(inputs.windows(self.path, self.default))
    first = self._window

    def read():
      for number, asked in windows:
        if number >= first:
          return number, [self._encoded(one) for one in asked]
      return None

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
      self._writer, self._written = writer, writer.submit(lambda: None)
      coming = reader.submit(read)
      while (window := coming.result()) is not None:
        coming = reader.submit(read)
        if not self._run_window(*window):
          break
      self._written.result()
      return window is None

  def _run_window(
    self, number: int, fit: list[tuple[requests.Asked, Asked | None]]
  ) -> bool:
    """Runs a window's blocks; returns whether it came to its end."""
    answers: list[Answer] = [(one, []) for one, asked in fit if not asked]
    wanted = [(one, asked) for one, asked in fit if asked]
    done = self._steps  # blocks of this window that an earlier run has ended
    if done:
      answers = []
    self.figures.failed += len(answers)
    self.on_block()
    for n, (block, shape, size, last) in enumerate(self._blocks(wanted), 1):
      if n <= done:
        continue
      if self.stopping:
        return False
      answers += self._answered(block, shape, size)
      if not last:
        self._commit(answers, number, n)
        answers = []
      self.on_block()
    self._commit(answers, number + 1, 0)
    return True

  def _commit(self, answers: list[Answer], window: int, steps: int) -> None:
    now = time.perf_counter()
    self.figures.seconds = self._before + now - self._began
    self._window, self._steps = window, steps
    self._written.result()  # or what went wrong with it
    self._written = self._writer.submit(
      self._write,
      answers,
      {
        'window': window,
        'steps': steps,
        'sizes': dict(self._sizes),
        'form': self._form,
        'figures': dataclasses.asdict(self.figures),
      },
    )

  def _write(self, answers: list[Answer], done: dict[str, Any]) -> None:
    """Commits answers; in an ordered job those of a window together."""
    lines = [
      (one.index, requests.line(one, choices, self.llm.name))
      for one, choices in answers
    ]
    if not self.ordered:
      self.journal.commit([line for _, line in lines], done)
    elif done['steps']:
      self.journal.keep([f'{n} {line}' for n, line in lines], done)
    else:
      for kept in self.journal.kept():
        n, line = kept.split(' ', 1)
        lines.append((int(n), line))
      self.journal.commit([line for _, line in sorted(lines)], done)

  def _encoded(
    self, one: requests.Asked
  ) -> tuple[requests.Asked, Asked | None]:
    """Returns a request with what is asked of the model, its prompt as token
    ids; or refused."""
    if one.error:
      return one, None
    if one.logprobs is not None and self.llm.tokenizer is None:
      why = 'log-probabilities are listed by text: the model has no tokenizer'
      return one.refused(why, 'logprobs'), None
    try:
      room = 0 if one.silent else None
      (ids,) = self.llm.encode([one.prompt], [one.params], room)
    except InputError as e:
      why = re.sub(r'^prompt 0: ', '', str(e))
      why = re.sub(r'^(prompt|text) 0 ', 'the prompt ', why)
      if one.batch:  # whose fields have other names
        why = why.replace('max_new_tokens', 'max_tokens')
        why = why.replace(', or set truncate_prompt', '')
      return one.refused(why, 'prompt'), None
    return one, Asked(
      prompt=ids,
      params=None if one.silent else one.params,
      n=one.n,
      logprobs=one.logprobs,
      echo=one.echo,
    )

  def _blocks(
    self, wanted
  ) -> Iterator[tuple[Any, tuple[int, int], list[int], bool]]:
    """Requests of about one length together, the longest first, so that what
    fits once fits always; with the shape and the size of their block, and
    whether it is the last."""
    if not wanted:
      return
    ordered = sorted(
      wanted,
      key=lambda pair: (
        -_rung(_LADDER, len(pair[1].prompt)),
        -pair[0].params.max_new_tokens,
        pair[0].index,
      ),
    )
    # Columns for the new tokens of any request, not of the block's own: caches
    # of one length take fewer compilations, and no more steps are made than
    # the block's requests want.
    new = _rung(_STEPS, max(one.params.max_new_tokens for one, _ in wanted))
    block: list[tuple[requests.Asked, Asked]] = []
    size, shape, rows = [0, 0], (0, 0), 0
    for pair in ordered:
      if block and rows + pair[0].n > math.prod(size):
        yield block, shape, size, False
        block, rows = [], 0
      if not block:
        shape = _rung(_LADDER, len(pair[1].prompt)), new
        size = self._size(*shape)
      block.append(pair)
      rows += pair[0].n
    yield block, shape, size, True

  def _size(self, prompt: int, new: int) -> list[int]:
    """Batch size, and number of batches, of blocks with so many columns.

    The planner says for the first, which are the longest of the first window.
    Shorter ones are twice, or four times, as large, for as many tokens, if that
    is expected to pay and no size was given: large blocks have requests of all
    lengths in them, and each size takes compilations.
    """
    name = f'{prompt}+{new}'
    if name not in self._sizes:
      if not self._sizes:
        rows = self.llm.block(prompt, new, inputs.WINDOW, within=_ENOUGH)
        self._sizes[name] = [*rows, prompt + new]
      else:
        self._sizes[name] = self._larger(prompt, new)
    return self._sizes[name][:2]

  def _larger(self, prompt: int, new: int) -> list[int]:
    size, batches, columns = next(iter(self._sizes.values()))

    def rate(size: int) -> float:
      return self.llm.rate(prompt, new, size, batches)

    while prompt + new > columns and size > 1 and not rate(size):
      size //= 2  # longer than all of the first window
    most = size * columns  # of a batch, in all its rows
    while not self.llm.batch_size and 2 * size * (prompt + new) <= most:
      if rate(size) >= _ENOUGH * rate(2 * size):
        break
      size *= 2
    return [size, batches, prompt + new]

  def _answered(self, block, shape, size: list[int]) -> list[Answer]:
    """Answers a block; in parts where there is no memory for all of it, as when
    a job goes on with less. What does not fit alone is refused."""
    try:
      return self._answer(block, shape, size)
    except InputError as e:
      if not str(e).startswith('does not fit'):
        raise
      if size == [1, 1]:
        self.figures.failed += len(block)
        return [(one.refused(str(e)), []) for one, _ in block]
    size = [-(-size[0] // 2), size[1] if size[0] > 1 else -(-size[1] // 2)]
    room = math.prod(size)
    answers = []
    for first in range(0, len(block), room):
      answers += self._answered(block[first : first + room], shape, size)
    return answers

  def _answer(
    self, block, shape: tuple[int, int], size: list[int]
  ) -> list[Answer]:
    """Runs a block.

    Args:
      shape: columns for prompts, and for new tokens.
      size: batch size, and number of batches.
    """
    prompt, new = shape
    each, asked = zip(*block, strict=True)
    self.llm.settle(*size)
    began = time.perf_counter()
    all_choices = complete(self.llm, asked, least=(prompt, new))
    f = self.figures
    f.engine_seconds += time.perf_counter() - began
    if self._form is None:
      plan = self.llm.plan
      self._form = {
        'dtype': plan.problem.dtype,
        'weight_bits': plan.policy.weight_bits,
        'cache_bits': plan.policy.cache_bits,
        'attention': plan.policy.attention,
      }
    rows = sum(one.n for one in asked)
    steps = max(one.params.max_new_tokens for one in each)
    f.padded_tokens += rows * (prompt + steps)
    name = f'{prompt}+{new}'
    f.shapes[name] = f.shapes.get(name, 0) + 1
    f.answered += len(block)
    f.prompt_tokens += sum(len(one.prompt) * one.n for one in asked)
    f.new_tokens += sum(
      choice.completion_tokens for made in all_choices for choice in made
    )
    return list(zip(each, all_choices, strict=True))


def _rung(ladder: Sequence[int], length: int) -> int:
  """The least rung that is long enough; beyond the last, the length itself."""
  n = bisect.bisect_left(ladder, length)
  return ladder[n] if n < len(ladder) else length
