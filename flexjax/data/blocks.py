"""Prompts of any length -> blocks [K, B, T], padded on the left.

Hides padding: a block's rows all end in the same column, so that one cache
position serves them all. A last block that is not full is padded with rows
that hold no request.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Block:
  """K batches of B prompts.

  Attributes:
    ids: [K, B, T] int32 token ids, padded on the left.
    start: [K, B] int32 columns of padding; T for a row without a request.
    index: [K, B] number of the request in each row; -1 for none.
  """

  ids: np.ndarray
  start: np.ndarray
  index: np.ndarray


def blocks(
  prompts: Sequence[Sequence[int]],
  *,
  batch_size: int,
  num_batches: int,
  prompt_len: int,
  pad_id: int,
) -> Iterator[Block]:
  """Yields the prompts in their order, batch_size x num_batches at a time."""
  room = batch_size * num_batches
  for first in range(0, len(prompts), room):
    ids = np.full((room, prompt_len), pad_id, np.int32)
    start = np.full(room, prompt_len, np.int32)
    index = np.full(room, -1, np.int32)
    for n, prompt in enumerate(prompts[first : first + room]):
      start[n] = prompt_len - len(prompt)
      ids[n, start[n] :] = prompt
      index[n] = first + n
    shape = (num_batches, batch_size)
    yield Block(
      ids.reshape(*shape, prompt_len),
      start.reshape(shape),
      index.reshape(shape),
    )
