"""Reads `pytorch_model.bin` without PyTorch and without running its pickle.

It hides from checkpoints what `torch.save` writes: a zip whose members are
storages, and a pickle that says which tensors are views of which storage. The
unpickler admits what state dicts need and refuses every other global by name,
so that a hostile file cannot run anything.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flexjax.errors import InputError
from flexjax.models.tensor_file import LazyTensor, span

_STORAGES: dict[str, Any] = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}
_PICKLE_BYTES = 64 * 2**20  # 175B parameters take less than one MiB
_OLD_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_LOCAL_HEADER = 30  # bytes of a zip member's header before name and extra


class _Storage(NamedTuple):
  """Consecutive elements in a file: `offset` and `size` in elements of it."""

  dtype: np.dtype
  offset: int
  size: int


class _View(NamedTuple):
  """A tensor that has no name yet."""

  storage: _Storage
  first: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def open_torch(path: Path) -> Mapping[str, LazyTensor]:
  """Returns the tensors of a state dict that `torch.save` wrote.

  Reads the pickle only; tensors stay in the file until their rows are read.

  Raises:
    InputError: the file is missing, truncated or compressed, is of PyTorch's
      format before 1.6, or holds anything but named tensors; names it.
  """
  try:
    with path.open('rb') as file:
      if file.read(len(_OLD_MAGIC)) == _OLD_MAGIC:
        raise InputError(
          f"{path} is in PyTorch's format before 1.6: load it and save it "
          'again with a newer PyTorch'
        )
      with zipfile.ZipFile(file) as archive:
        views = _Reader(path, file, archive).load()
  except InputError:
    raise
  except OSError as e:
    raise InputError(f'cannot read {path}: {e.strerror}') from None
  except zipfile.BadZipFile as e:
    raise InputError(
      f'{path} is truncated, or not a file that PyTorch 1.6 or later wrote: {e}'
    ) from None
  except Exception as e:  # Whatever a malformed pickle makes of its reader.
    raise InputError(f'{path} is malformed: {type(e).__name__}: {e}') from None
  if not isinstance(views, dict):
    raise InputError(f'{path} holds no state dict')
  return {name: _named(path, name, view) for name, view in views.items()}


class _Reader:
  """Finds the members of one archive."""

  def __init__(self, path, file, archive: zipfile.ZipFile) -> None:
    self.path, self.file, self.archive = path, file, archive
    self.end = file.seek(0, io.SEEK_END)
    picked = [n for n in archive.namelist() if n.endswith('/data.pkl')]
    if len(picked) != 1:
      raise InputError(f'{path} is a zip file, but not of torch.save')
    self.root = picked[0].removesuffix('data.pkl')

  def load(self) -> Any:
    """Returns what the pickle holds, with a _View for every tensor."""
    order = f'{self.root}byteorder'
    if order in self.archive.namelist():
      self._offset(order)
      if self.archive.read(order) != b'little':
        raise InputError(f'{self.path} was written in big-endian order')
    name = f'{self.root}data.pkl'
    info = self._offset(name)[1]
    if info.file_size > _PICKLE_BYTES:
      raise InputError(f'{self.path}: {name} has {info.file_size} bytes')
    unpickler = _Unpickler(io.BytesIO(self.archive.read(name)))
    unpickler.reader = self
    return unpickler.load()

  def storage(self, kind: str, key: str, size: int) -> _Storage:
    """Returns the storage that a persistent id of the pickle names."""
    dtype = np.dtype(_STORAGES[kind])
    offset, info = self._offset(f'{self.root}data/{key}')
    if not 0 <= size * dtype.itemsize <= info.file_size:
      raise InputError(
        f'{self.path}: storage {key} has {info.file_size} bytes, not '
        f'{size} elements of {dtype.name}'
      )
    return _Storage(dtype, offset, size)

  def _offset(self, name: str) -> tuple[int, zipfile.ZipInfo]:
    """Returns where a member's bytes begin, and its directory entry."""
    try:
      info = self.archive.getinfo(name)
    except KeyError:
      raise InputError(f"{self.path} lacks its member '{name}'") from None
    if info.compress_type != zipfile.ZIP_STORED:
      raise InputError(f"{self.path}: its member '{name}' is compressed")
    # The directory does not say how long the local header's padding is.
    self.file.seek(info.header_offset)
    header = self.file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b'PK\3\4':
      raise InputError(f"{self.path}: its member '{name}' has no header")
    begin = info.header_offset + _LOCAL_HEADER
    begin += sum(struct.unpack('<HH', header[26:]))
    if begin + info.file_size > self.end:
      raise InputError(f"{self.path} is truncated in its member '{name}'")
    return begin, info


class _Unpickler(pickle.Unpickler):
  """Builds state dicts and nothing else."""

  reader: _Reader

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
      return _rebuild_tensor
    if (module, name) == ('torch._utils', '_rebuild_parameter'):
      return _rebuild_parameter
    if module in ('torch', 'torch.storage') and name in _STORAGES:
      return name
    raise InputError(
      f"{self.reader.path} asks for '{module}.{name}', which no state dict "
      'of tensors needs; refused'
    )

  def persistent_load(self, pid: Any) -> _Storage:
    tag, kind, key, _, size = pid
    if tag != 'storage' or type(size) is not int:
      raise ValueError(f'unknown persistent id {tag!r}')
    return self.reader.storage(kind, key, size)


def _rebuild_tensor(storage, first, shape, strides, *_) -> _View:
  """Stands for torch's function of that name; checks the bounds."""
  view = _View(storage, first, tuple(shape), tuple(strides))
  numbers = (first, *view.shape, *view.strides)
  if not isinstance(storage, _Storage) or not all(
    type(n) is int and n >= 0 for n in numbers
  ):
    raise ValueError('a tensor is no view of a storage')
  if first + span(view.shape, view.strides) > storage.size:
    raise ValueError(
      f'a tensor of shape {view.shape} and strides {view.strides} reaches '
      f'past the {storage.size} elements of its storage'
    )
  return view


def _rebuild_parameter(view, *_) -> Any:
  return view


def _named(path: Path, name: Any, view: Any) -> LazyTensor:
  if not isinstance(name, str) or not isinstance(view, _View):
    raise InputError(
      f'{path} is no state dict: {str(name)[:80]!r} is not a tensor'
    )
  dtype, offset, _ = view.storage
  return LazyTensor(
    path=path,
    name=name,
    dtype=dtype,
    shape=view.shape,
    strides=view.strides,
    offset=offset + view.first * dtype.itemsize,
  )
