"""Which of a window's requests share a block.

They are sorted by length and cut into blocks of few sizes and shapes: that
depends on the requests and on the sizes alone, which whoever stops and goes on
hands over.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexjax.apps import inputs, requests
from flexjax.apps.completions import Asked
from flexjax.runtime.llm import LLM

# Columns of blocks: few, and at most half as much again as is needed.
_LADDER = sorted(n for p in range(3, 13) for n in (2**p, 3 * 2 ** (p - 1)))
_STEPS = tuple(2**n for n in range(13))  # new tokens likewise
_ENOUGH = 0.9  # of the best throughput, for blocks that are small
Pair = tuple[requests.Asked, Asked]
"""A line, and what it asks of the model: token ids for a prompt."""


class Group(NamedTuple):
  """Requests of one block.

  Attributes:
    shape: columns for prompts, and for new tokens.
    size: batch size, and number of batches.
    last: of its window.
  """

  pairs: list[Pair]
  shape: tuple[int, int]
  size: list[int]
  last: bool


class Grouping:
  """Cuts windows into blocks for one model.

  Args:
    sizes: of blocks that there have been: by shape, batch size, number of
      batches and columns. New ones are added.
  """

  def __init__(self, llm: LLM, sizes: dict[str, list[int]]):
    self.llm, self.sizes = llm, sizes

  def groups(self, wanted: Sequence[Pair]) -> Iterator[Group]:
    """Yields requests of about one length together, the longest first, so that
    what fits once fits always."""
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
    block: list[Pair] = []
    size, shape, rows = [0, 0], (0, 0), 0
    for pair in ordered:
      if block and rows + pair[0].n > math.prod(size):
        yield Group(block, shape, size, False)
        block, rows = [], 0
      if not block:
        shape = _rung(_LADDER, len(pair[1].prompt)), new
        size = self._size(*shape)
      block.append(pair)
      rows += pair[0].n
    yield Group(block, shape, size, True)

  def _size(self, prompt: int, new: int) -> list[int]:
    """Batch size, and number of batches, of blocks with so many columns.

    The planner says for the first, which are the longest of the first window.
    Shorter ones are twice, or four times, as large, for as many tokens, if that
    is expected to pay and no size was given: large blocks have requests of all
    lengths in them, and each size takes compilations.
    """
    name = f'{prompt}+{new}'
    if name not in self.sizes:
      if not self.sizes:
        rows = self.llm.block(prompt, new, inputs.WINDOW, within=_ENOUGH)
        self.sizes[name] = [*rows, prompt + new]
      else:
        self.sizes[name] = self._larger(prompt, new)
    return self.sizes[name][:2]

  def _larger(self, prompt: int, new: int) -> list[int]:
    size, batches, columns = next(iter(self.sizes.values()))

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


def _rung(ladder: Sequence[int], length: int) -> int:
  """The least rung that is long enough; beyond the last, the length itself."""
  n = bisect.bisect_left(ladder, length)
  return ladder[n] if n < len(ladder) else length
