"""A job: a file of requests, however long, to a file of results.

The input goes by in windows of so many lines, a window in blocks (`grouping`).
A job that was stopped at any moment goes on with the same blocks, and ends with
the same results.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flexjax.apps import inputs, requests
from flexjax.apps.completions import Asked, Choice, complete
from flexjax.apps.grouping import Grouping, Pair
from flexjax.apps.journal import Journal
from flexjax.config import SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.llm import LLM

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
    self._grouping = Grouping(llm, done['sizes'])
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
    for n, group in enumerate(self._grouping.groups(wanted), 1):
      if n <= done:
        continue
      if self.stopping:
        return False
      answers += self._answered(group.pairs, group.shape, group.size)
      if not group.last:
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
        'sizes': dict(self._grouping.sizes),
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

  def _answered(
    self, block: list[Pair], shape: tuple[int, int], size: list[int]
  ) -> list[Answer]:
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
    self, block: list[Pair], shape: tuple[int, int], size: list[int]
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
