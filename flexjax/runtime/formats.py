"""How a model's weights are stored: dtype, and how its matrices are packed."""

import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.config import (
  CHOICES,
  DTYPE_BYTES,
  UNPACKED,
  ModelConfig,
  Packing,
)
from flexjax.errors import InputError
from flexjax.models import opt
from flexjax.quant import groupwise
from flexjax.tiers.base import Spec
from flexjax.typing import Piece, WeightSource

_CHUNK_ELEMENTS = 4 * 2**20  # packed at once: bounds the search's temporaries
_AT_ONCE = 2  # chunks that threads may pack at a time


@dataclasses.dataclass(frozen=True)
class Format:
  """How weights are stored.

  Attributes:
    dtype: of what is not packed, and of computing.
    packing: of the layers' matrices, in groups along their last axis, which
      the product sums over.
    rounding: a key of `groupwise.ROUNDINGS`.
  """

  dtype: str
  packing: Packing = UNPACKED
  rounding: str = 'search'

  @property
  def itemsize(self) -> int:
    """Bytes of a number that is not packed."""
    return DTYPE_BYTES[self.dtype]

  def specs(self, config: ModelConfig) -> list[Spec]:
    """Returns shape and dtype of every tensor of every weight group.

    Raises:
      InputError: the groups do not divide a matrix; names it.
    """
    return [
      {name: self._spec(name, shape) for name, shape in group.items()}
      for group in opt.weight_groups(config)
    ]

  def _spec(self, name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    dtype = jnp.dtype(self.dtype)
    if not self.packing.packs or name not in opt.MATRICES:
      return jax.ShapeDtypeStruct(shape, dtype)
    try:
      row = self.packing.row_bytes(shape[-1], dtype.itemsize)
    except InputError as e:
      raise InputError(
        f"matrix '{name}' cannot be stored in {self.packing.bits} bits: {e}"
      ) from None
    return jax.ShapeDtypeStruct((*shape[:-1], row), jnp.uint8)

  def to_json(self) -> dict[str, Any]:
    fields = {'dtype': self.dtype, 'weight_bits': self.packing.bits}
    if self.packing.packs:
      fields |= {
        'group_size': self.packing.group_size,
        'axis': 'in',
        'rounding': self.rounding,
      }
    return fields

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> 'Format':
    """Reads what `to_json` wrote.

    Raises:
      KeyError: a field is missing.
      ValueError: a field is not what it could be.
    """
    names = ['dtype', 'weight_bits']
    if fields['weight_bits'] != 16:
      names += ['group_size', 'rounding']
    choices = {**CHOICES, 'dtype': tuple(DTYPE_BYTES)}
    for name in names:
      if fields[name] not in choices[name]:
        raise ValueError(f'{name} is {fields[name]!r}')
    if fields['weight_bits'] == 16:
      return cls(fields['dtype'])
    packing = Packing(fields['weight_bits'], fields['group_size'])
    return cls(fields['dtype'], packing, fields['rounding'])

  def __str__(self) -> str:
    if not self.packing.packs:
      return self.dtype
    return (
      f'{self.dtype}, matrices in {self.packing.bits} bits '
      f'(groups of {self.packing.group_size}, {self.rounding})'
    )


class PackedSource:
  """A WeightSource whose matrices are packed on their way.

  Packing is done on the device, a few million numbers at a time.

  Args:
    moments: of every weight group, matrix name -> what is known of the vectors
      it is multiplied by.
  """

  def __init__(
    self,
    source: WeightSource,
    form: Format,
    moments: Sequence[Mapping[str, groupwise.Moments]],
  ):
    self.fingerprint = source.fingerprint
    self._source, self._moments = source, moments
    self._pack = jax.jit(
      functools.partial(
        groupwise.pack,
        packing=form.packing,
        rounding=groupwise.ROUNDINGS[form.rounding],
      )
    )
    self._turn = threading.Semaphore(_AT_ONCE)

  def pieces(self, group: int, dtype: Any) -> Iterator[Piece]:
    """Yields the source's pieces, those of matrices as uint8."""
    for name, row, array in self._source.pieces(group, dtype):
      if name not in opt.MATRICES:
        yield Piece(name, row, array)
        continue
      moments = self._moments[group].get(name)
      # Chunks of few shapes, because each takes a compilation.
      step = max(1, _CHUNK_ELEMENTS // array.shape[1])
      step = min(step, 1 << (len(array) - 1).bit_length())
      for begin in range(0, len(array), step):
        rows = array[begin : begin + step]
        yield Piece(name, row + begin, self._packed(rows, step, moments))

  def _packed(
    self, rows: np.ndarray, step: int, moments: groupwise.Moments | None
  ) -> np.ndarray:
    count = len(rows)
    if count < step:
      rows = np.concatenate(
        [rows, np.zeros((step - count, rows.shape[1]), rows.dtype)]
      )
    with self._turn:
      rows, moments = jax.device_put((rows, moments))
      return jax.device_get(self._pack(rows, moments=moments))[:count]
