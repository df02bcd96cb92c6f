"""Tensors in files, read row by row; the safetensors container.

It hides from checkpoints where in a file a tensor's elements lie and in which
order. Reads go through plain file reads into the caller's array, never a
memory map, so a model of any size streams through a bounded resident set.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flexjax.errors import InputError

_SLAB_BYTES = 8 * 2**20  # of a strided tensor, read at once
_HEADER_BYTES = 100 * 10**6  # the format's own limit
_DTYPES: dict[str, Any] = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyTensor:
  """Element i of the tensor lies at byte `offset + itemsize * (i . strides)`.

  Attributes:
    strides: in elements, none negative; as long as `shape`.
    offset: of the first element in the file, in bytes.
  """

  path: Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor once read."""
    return self.dtype.itemsize * math.prod(self.shape)

  def rows(self, begin: int, end: int) -> np.ndarray:
    """Reads rows [begin, end) of the leading axis; blocks.

    Raises:
      InputError: the file is gone, or ends before them.
    """
    out = np.empty((end - begin, *self.shape[1:]), self.dtype)
    if not out.size:
      return out
    first = begin * self.strides[0]
    try:
      with self.path.open('rb', buffering=0) as file:
        if self.strides == dense_strides(self.shape):
          self._fill(file, first, out)
        else:
          self._gather(file, first, out)
    except OSError as e:
      raise InputError(f'cannot read {self.path}: {e.strerror}') from None
    return out

  def _gather(self, file, first: int, out: np.ndarray) -> None:
    """Reads a strided tensor in slabs across its longest stride."""
    axis = max(range(out.ndim), key=lambda n: self.strides[n])
    stride = self.strides[axis]
    step = max(1, _SLAB_BYTES // max(1, stride * self.dtype.itemsize))
    for low in range(0, out.shape[axis], step):
      part = np.moveaxis(out, axis, 0)[low : low + step]
      part = np.moveaxis(part, 0, axis)
      flat = np.empty(span(part.shape, self.strides), self.dtype)
      self._fill(file, first + low * stride, flat)
      strides = [s * self.dtype.itemsize for s in self.strides]
      part[...] = np.lib.stride_tricks.as_strided(flat, part.shape, strides)

  def _fill(self, file, first: int, out: np.ndarray) -> None:
    """Fills `out` with the elements that lie from number `first` on."""
    file.seek(self.offset + first * self.dtype.itemsize)
    left = memoryview(out.reshape(-1).view(np.uint8).data)
    while left:
      count = file.readinto(left)
      if not count:
        raise InputError(
          f"{self.path} is truncated: tensor '{self.name}' goes on for "
          f'{len(left)} bytes past its end'
        )
      left = left[count:]


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the strides, in elements, of a row-major tensor."""
  return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
  """Returns how many consecutive elements a strided tensor lies within."""
  if not math.prod(shape):
    return 0
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def open_safetensors(path: Path) -> Mapping[str, LazyTensor]:
  """Returns the tensors of a safetensors file; reads its header only.

  Raises:
    InputError: the file is missing, truncated or malformed; names it.
  """
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      if size < 8 or length > min(size - 8, _HEADER_BYTES):
        raise InputError(
          f'{path} is truncated or no safetensors file: {size} bytes, its '
          f'header claims {length}'
        )
      header = json.loads(file.read(length))
    if not isinstance(header, dict):
      raise TypeError('its header is no JSON object')
    header.pop('__metadata__', None)
    data = 8 + length
    tensors = {n: _entry(path, n, e, data) for n, e in header.items()}
  except OSError as e:
    raise InputError(f'cannot read {path}: {e.strerror}') from None
  except (ValueError, TypeError, KeyError, RecursionError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'{path} is no safetensors file: {e}') from None
  end = max((t.offset + t.nbytes for t in tensors.values()), default=data)
  if end != size:
    fault = 'is truncated' if size < end else 'has bytes that no tensor owns'
    raise InputError(f'{path} {fault}: {size} bytes, its tensors need {end}')
  return tensors


def _entry(path: Path, name: str, entry: Any, data: int) -> LazyTensor:
  if entry['dtype'] not in _DTYPES:
    raise InputError(
      f"{path}: tensor '{name}' is stored as {entry['dtype']}, which flexjax "
      'does not read'
    )
  shape = tuple(entry['shape'])
  begin, end = entry['data_offsets']
  if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
    raise ValueError(f"tensor '{name}' has no valid shape or offsets")
  tensor = LazyTensor(
    path=path,
    name=name,
    dtype=np.dtype(_DTYPES[entry['dtype']]),
    shape=shape,
    strides=dense_strides(shape),
    offset=data + begin,
  )
  if tensor.nbytes != end - begin:
    raise ValueError(
      f"tensor '{name}' of {tensor.nbytes} bytes is given {end - begin}"
    )
  return tensor
