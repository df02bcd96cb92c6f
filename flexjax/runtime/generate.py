"""Follows the requests of a block from prompt to finished text.

Hides when tokens reach the host: a batch whose requests can only end by
length is never waited for; one that may stop early is looked at just before
its next token. Finished batches are no longer wanted, half-finished ones are
made smaller, so that neither costs compute or transfers.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array

from flexjax.config import SamplingParams
from flexjax.data.blocks import Block

Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class Output:
  """One finished request.

  Attributes:
    index: its number among the prompts, from 0.
    prompt: the prompt as it was given.
    text: what was generated, without special tokens, cut before a stop string.
    token_ids: every generated id, an ending eos or stop id included.
    finish_reason: 'eos', 'stop' or 'length'.
  """

  index: int
  prompt: str | list[int]
  text: str
  token_ids: list[int]
  finish_reason: str


class Request:
  """One prompt on its way."""

  def __init__(
    self, index: int, params: SamplingParams, eos_id: int, decode: Decode
  ):
    self.index, self.params, self.eos_id = index, params, eos_id
    self.decode = decode
    self.ids: list[int] = []
    self.text: str | None = None
    self.reason = ''
    # A token is at least one byte: the stop string lies in so many at most.
    self._tail = max((len(s.encode()) for s in params.stop), default=0) + 8

  @property
  def may_stop(self) -> bool:
    """Whether it can end before its length is reached."""
    p = self.params
    return bool(not p.ignore_eos or p.stop or p.stop_token_ids)

  def add(self, token: int) -> None:
    """Takes the next token in, unless the request has ended."""
    if self.reason:
      return
    self.ids.append(token)
    p = self.params
    if token in p.stop_token_ids:
      self.reason, self.text = 'stop', self.decode(self.ids[:-1])
    elif token == self.eos_id and not p.ignore_eos:
      self.reason, self.text = 'eos', self.decode(self.ids[:-1])
    elif p.stop and self._found():
      self.reason = 'stop'
    elif len(self.ids) >= p.max_new_tokens:
      self.reason = 'length'
    if self.reason and self.text is None:
      self.text = self.decode(self.ids)

  def _found(self) -> bool:
    """Looks for a stop string; cuts the text before the first."""
    tail = self.decode(self.ids[-self._tail :])
    if not any(stop in tail for stop in self.params.stop):
      return False
    text = self.decode(self.ids)
    cuts = [n for stop in self.params.stop if (n := text.find(stop)) >= 0]
    if cuts:
      self.text = text[: min(cuts)]
    return bool(cuts)


class Progress:
  """The requests of one block, row by row.

  Args:
    block: the padded prompts.
    requests: by index, those of the block at least.
    resize: called as resize(i, k, rows) when batch k shrinks to `rows` before
      its token i.
    worth: asked as worth(k, size, steps) whether shrinking batch k to `size`
      pays when up to `steps` tokens are left.
    on_token: told how many requests of the block got a token, and ended.

  Attributes:
    prefill_seconds, decode_seconds: time until the results were there.
  """

  def __init__(
    self,
    block: Block,
    requests: Sequence[Request],
    resize: Callable[[int, int, np.ndarray], None],
    worth: Callable[[int, int, int], bool] = lambda k, size, steps: True,
    on_token: Callable[[int, int], None] = lambda tokens, ended: None,
  ):
    self.rows: list[list[Request | None]] = [
      [requests[n] if n >= 0 else None for n in batch] for batch in block.index
    ]
    self.resize, self.worth, self.on_token = resize, worth, on_token
    self.prefill_seconds = self.decode_seconds = 0.0
    self._new: list[list[Array]] = [[] for _ in self.rows]
    # Newest token that was decided on: a batch shrinks before its first
    # layer or not at all, whatever is asked later.
    self._decided = [-1 for _ in self.rows]
    # Of the live rows of each batch: how many tokens they want at most, and
    # whether one may end before. The schedule asks for every cell.
    self._until = [0 for _ in self.rows]
    self._may_stop = [False for _ in self.rows]
    for k in range(len(self.rows)):
      self._look(k)
    self._stamp = time.perf_counter()
    self._steps = 0  # decode steps of a batch whose tokens are here

  @property
  def step_seconds(self) -> float:
    """Time of a decode step of one batch, so far."""
    return self.decode_seconds / self._steps if self._steps else 0.0

  def wanted(self, i: int, k: int, now: bool) -> bool:
    """Whether any request of batch k still wants token i."""
    first = now and self._decided[k] < i
    if first and self._may_stop[k]:
      self._settle(k)
    if first:
      self._decided[k] = i
      live = [r for r in self._live(k) if i < r.params.max_new_tokens]
      if i > 0 and 0 < 2 * len(live) <= len(self.rows[k]):
        self._shrink(i, k, live)
    return i < self._until[k]

  def _live(self, k: int) -> list[Request]:
    return [r for r in self.rows[k] if r is not None and not r.reason]

  def took(self, i: int, k: int, result: Array) -> None:
    """Token i of batch k has been dispatched."""
    self._new[k].append(result)
    if i == 0:
      jax.block_until_ready(result)
      self.prefill_seconds += self._lap()
    elif i + 1 >= self._until[k]:
      self._settle(k)

  def finish(self) -> None:
    """Takes in whatever tokens are left."""
    for k in range(len(self.rows)):
      self._settle(k)
    self.decode_seconds += self._lap()

  def _settle(self, k: int) -> None:
    if not self._new[k]:
      return
    for tokens in jax.device_get(self._new[k]):
      live = self._live(k)
      for request, token in zip(self.rows[k], tokens.tolist(), strict=True):
        if request is not None:
          request.add(token)
      self.on_token(len(live), sum(bool(r.reason) for r in live))
    self._steps += len(self._new[k])
    self._new[k] = []
    self._look(k)
    self.decode_seconds += self._lap()

  def _look(self, k: int) -> None:
    live = self._live(k)
    self._until[k] = max((r.params.max_new_tokens for r in live), default=0)
    self._may_stop[k] = any(r.may_stop for r in live)

  def _shrink(self, i: int, k: int, live: Sequence[Request]) -> None:
    """Keeps the live rows, in a batch of half the size, a quarter, ..."""
    self._settle(k)
    size = len(self.rows[k])
    while size > 1 and (size + 1) // 2 >= len(live):
      size = (size + 1) // 2
    left = max(r.params.max_new_tokens - len(r.ids) for r in live)
    if size == len(self.rows[k]) or not self.worth(k, size, left):
      return
    keep = [self.rows[k].index(r) for r in live]
    spare = size - len(live)
    self.rows[k] = [*live, *[None] * spare]
    self.resize(i, k, np.array(keep + keep[:1] * spare, np.int32))

  def _lap(self) -> float:
    before, self._stamp = self._stamp, time.perf_counter()
    return self._stamp - before
