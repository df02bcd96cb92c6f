"""The one legend of dimension letters, and the names that every layer shares.

    B  rows (prompts) in a batch         N  attention heads
    K  batches in a block                H  head dimension
    T  new tokens of a step              D  model dimension (hidden size)
    S  rows of the KV cache              E  token embedding dimension
    J  layers of the schedule            F  feed-forward dimension
    P  positions in the table            V  vocabulary

The schedule's letters are the paper's: token step i, layer j, batch k.
Einsums and shape comments spell these letters: `q = dense(x)  # [B, N, T, H]`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Key = tuple[str | int, ...]
"""What a tier files a value under: ('weights', g), ('cache', j, k), ..."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""


class Piece(NamedTuple):
  """Some consecutive rows of one tensor: bounded memory, whatever the model.

  Attributes:
    name: the tensor's name within its group.
    row: index of the piece's first row along the tensor's leading axis.
    array: the rows, a NumPy array in the dtype that was asked for.
  """

  name: str
  row: int
  array: Any


class WeightSource(Protocol):
  """Where weights come from: a checkpoint, a converted store, a seed."""

  fingerprint: str
  """Changes when any weight may have changed."""

  def pieces(self, group: int, dtype: Any) -> Iterator[Piece]:
    """Yields weight group `group` as pieces of at most 32 MiB, in `dtype`."""
    ...
