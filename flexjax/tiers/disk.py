"""A TensorStore on disk: zarr3, uncompressed, read into reused buffers, or used
where it is mapped.

Hides files, chunks and threads. Weights outlive the run; everything else lies
in a folder of this run, which goes when the tier is closed. Reads and writes
run in threads of their own; a read of a key waits for the writes to it, and an
error in a thread is raised by whoever waits for its result.
"""

import math
import mmap
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Sharding

from flexjax.config import DISK_CACHE_CHUNK, MAX_DISK_WRITES
from flexjax.errors import InputError
from flexjax.tiers.base import At, Pending, Spec, Tier, Value
from flexjax.tiers.buffers import Buffers, Files, can_map
from flexjax.typing import Key, Piece

_CHUNK_BYTES = 16 * 2**20
_HUGE_PAGE, _PAGE = 2**21, 2**14  # bytes: pages of 4 or 16 KiB are usual
_SCRATCH = re.compile(r'run-([0-9]+)-[0-9a-f]{8}')
_ROWS_AXIS = -2  # of a cache [B, N, S, H]


class DiskTier(Tier):
  """Values as zarr3 arrays below `root`.

  Args:
    root: a directory; made if it is absent.
    host: where arrays are gathered before they are written.
    device: where reads end.

  Attributes:
    unified: host and device are one memory, where buffers are what was read.
    peak_host_nbytes: the most that `host_nbytes` has been.

  Raises:
    InputError: `root` cannot be written.
  """

  def __init__(self, root: Path, host: Sharding, device: Sharding):
    super().__init__()
    self.root = root
    self.host, self.device = host, device
    self.moves = True
    self.scratch = root / f'run-{os.getpid()}-{uuid.uuid4().hex[:8]}'
    self._arrays: dict[Key, dict[str, ts.TensorStore]] = {}
    self._files: dict[tuple[Key, str], Files] = {}  # that are mapped
    self._shapes: dict[tuple[Key, str], tuple[int, ...]] = {}
    self._whole: dict[Key, int] = {}  # bytes of the latest whole value
    self._writes: dict[Key, Future] = {}
    self._under_way: deque[tuple[Future, int]] = deque()
    self._writing = 0  # bytes of what is under way
    self.peak_host_nbytes = 0
    self._buffers = Buffers()
    self._readers = ThreadPoolExecutor(4, 'flexjax-read')
    self._writers = ThreadPoolExecutor(2, 'flexjax-write')
    # Where the CPU computes, weights are used where their files are mapped, and
    # copies of mapped files cost it half the time of reads; from a cold disk
    # plain reads are a fifth faster.
    self.unified = host == device
    mode = 'memmap' if self.unified else 'default'
    settings = {
      'cache_pool': {'total_bytes_limit': 0},
      'file_io_mode': {'mode': mode},
    }
    self._durable = ts.Context(settings)
    self._hasty = ts.Context(settings | {'file_io_sync': False})
    try:
      root.mkdir(parents=True, exist_ok=True)
      for old in root.iterdir():
        match = _SCRATCH.fullmatch(old.name)
        if match and not _is_running(int(match[1])):
          shutil.rmtree(old, ignore_errors=True)
      self.scratch.mkdir()
    except OSError as e:
      raise InputError(f"disk_dir '{root}' cannot be written: {e}") from None

  @property
  def host_nbytes(self) -> int:
    """Bytes of host memory: buffers that reads pass through, and writes that
    are under way."""
    return self._buffers.nbytes + self._writing

  def allocate(self, key: Key, spec: Spec) -> None:
    super().allocate(key, spec)
    lasting = key[0] == 'weights'
    folder = (self.root if lasting else self.scratch) / _folder_of(key)
    try:
      self._arrays[key] = {
        name: ts.open(
          _array_spec(folder / name, s),
          create=True,
          open=lasting,
          context=self._durable if lasting else self._hasty,
        ).result()
        for name, s in spec.items()
      }
    except ValueError as e:  # TensorStore's, of a file or a full disk
      raise _unusable(self.root, key, 'written', e) from None
    if lasting and self.unified and can_map():
      for name, array in self._arrays[key].items():
        if files := _files_of(folder / name, array):
          self._files[key, name] = files

  def free(self, key: Key) -> None:
    super().free(key)
    self._whole.pop(key, None)
    if (write := self._writes.pop(key, None)) is not None:
      write.exception()  # of no interest any more, but it must have ended
    for name in self._arrays.pop(key):
      self._shapes.pop((key, name), None)
      self._files.pop((key, name), None)
    self._buffers.keep(
      {
        (s.shape, s.dtype)
        for spec in self.specs.values()
        for s in spec.values()
      }
    )
    if key[0] != 'weights':
      shutil.rmtree(self.scratch / _folder_of(key))

  def read(self, key: Key, rows: int | None = None) -> Pending:
    future = self._readers.submit(self._read, key, rows, self._writes.get(key))
    return _DiskRead(future, self._buffers)

  def write(self, key: Key, value: Value, at: At | None = None) -> None:
    # A device array goes by way of the host's memory: the fast road.
    held = jax.device_put(dict(value), self.host)
    while len(self._under_way) >= MAX_DISK_WRITES:
      self._written(*self._under_way.popleft())
    self._writes[key] = self._writers.submit(
      self._write, key, held, at, self._writes.get(key)
    )
    nbytes = sum(v.nbytes for v in held.values())
    if at is None:
      self._whole[key] = nbytes
    self._under_way.append((self._writes[key], nbytes))
    self._writing += nbytes
    self.count_host()

  def _written(self, write: Future, nbytes: int) -> None:
    try:
      write.result()
    finally:
      self._writing -= nbytes

  def count_host(self) -> None:
    """Takes note of the host memory that is held now."""
    self.peak_host_nbytes = max(self.peak_host_nbytes, self.host_nbytes)

  def written(self, key: Key) -> Any:
    write = self._writes.get(key)
    return () if write is None else write.result

  def wait(self) -> None:
    for future in list(self._writes.values()):
      future.result()
    while self._under_way:
      self._written(*self._under_way.popleft())

  def close(self) -> None:
    """Ends the threads and deletes what belongs to this run."""
    self._readers.shutdown(cancel_futures=True)
    self._writers.shutdown(cancel_futures=True)
    self._buffers.keep(set())  # mapped files would keep a disk's space
    shutil.rmtree(self.scratch, ignore_errors=True)

  def sent_nbytes(self, key: Key, value: Value, at: At | None) -> int:
    del at  # what the files get, which may be wider than the value
    spec = self.specs[key]
    return sum(v.size * spec[name].dtype.itemsize for name, v in value.items())

  def stored_nbytes(self, key: Key, rows: int | None = None) -> int:
    nbytes = self._whole.get(key, self.sizes[key])
    if rows is not None:
      nbytes = nbytes // next(iter(self.specs[key].values())).shape[-2] * rows
    return nbytes

  def _read(self, key: Key, rows: int | None, before: Future | None):
    if before is not None:
      before.result()
    views, copies = {}, []
    try:
      for name, array in self._arrays[key].items():
        shape = self._shapes.get((key, name), array.shape)
        dtype = array.dtype.numpy_dtype
        if files := self._files.get((key, name)):
          views[name] = self._buffers.take_files(shape, dtype, files)
          self.count_host()
          continue
        views[name] = view = self._buffers.take(shape, dtype)
        self.count_host()
        part: Any = ts.d[:][tuple(slice(0, n) for n in shape)]
        target = view
        if rows is not None:
          part = (*(slice(0, n) for n in shape[:-2]), slice(0, rows))
          target = view[..., :rows, :]
        copies.append(ts.array(target).write(array[part]))
      for copy in copies:
        copy.result()
    except (OSError, ValueError) as e:  # ValueError: TensorStore's, of a file
      for copy in copies:
        copy.exception()  # else it would go on
      for view in views.values():
        self._buffers.give(view, [])
      raise _unusable(self.root, key, 'read', e) from None
    return views, jax.device_put(views, self.device)

  def _write(self, key: Key, value, at: At | None, before: Future | None):
    if before is not None:
      before.result()
    for name, rows in jax.device_get(value).items():
      array = self._arrays[key][name]
      if at is None:
        part = tuple(slice(0, n) for n in rows.shape)
        self._shapes[key, name] = rows.shape
      else:
        axis = at.axis % array.ndim
        end = at.begin + rows.shape[axis]
        part = (*(slice(None),) * axis, slice(at.begin, end))
      try:
        array[part].write(rows).result()
      except ValueError as e:
        raise _unusable(self.root, key, 'written', e) from None


class _DiskRead:
  """A read in its thread, and the buffers it fills."""

  def __init__(self, future: Future, buffers: Buffers):
    self._future, self._buffers = future, buffers

  def result(self) -> dict[str, jax.Array]:
    return self._future.result()[1]

  def release(self, after: Sequence[jax.Array] = ()) -> None:
    if self._future.exception() is not None:
      return  # whoever asked for the result has been told
    views, arrays = self._future.result()
    # An array may be the buffer itself, so wait for its readers too.
    for name, view in views.items():
      self._buffers.give(view, [arrays[name], *after])


def discard(root: Path, key: Key, spec: Spec) -> None:
  """Deletes what the disk tier below `root` holds of a key, if anything."""
  folder = root / _folder_of(key)
  for name in spec:
    shutil.rmtree(folder / name, ignore_errors=True)
  with suppress(OSError):  # there is none, or something else is in it
    folder.rmdir()


def read_pieces(root: Path, key: Key, spec: Spec) -> Iterator[Piece]:
  """Yields what the disk tier below `root` holds of a key, a chunk at a time.

  Raises:
    OSError: a file is missing or damaged.
  """
  context = ts.Context({'cache_pool': {'total_bytes_limit': 0}})
  try:
    for name, s in spec.items():
      path = root / _folder_of(key) / name
      about = _array_spec(path, s)
      array = ts.open(about, open=True, context=context).result()
      step = _stored_chunk(array)[0]
      for row in range(0, s.shape[0], step):
        end = min(row + step, s.shape[0])
        yield Piece(name, row, array[row:end].read().result())
  except ValueError as e:  # how TensorStore says that a file is not right
    raise _unusable(root, key, 'read', e) from None


def _folder_of(key: Key) -> str:
  return '.'.join(map(str, key))


def _unusable(root: Path, key: Key, how: str, error: Exception) -> OSError:
  reason = str(error).split(' [tensorstore_spec=')[0]  # internals follow
  advice = ''
  if how == 'read' and key[0] == 'weights':
    advice = f"; delete '{root}' and write it again"
  return OSError(
    f"'{root}': {_folder_of(key)} cannot be {how}: {reason}{advice}"
  )


def _files_of(path: Path, array: ts.TensorStore) -> Files | None:
  """Returns the files of an array's rows, where they can lie in memory one
  after the other: each as whole pages."""
  chunk = _stored_chunk(array)
  each = int(np.prod(chunk)) * array.dtype.numpy_dtype.itemsize
  count = -(-array.shape[0] // chunk[0])
  if chunk[1:] != array.shape[1:] or (count > 1 and each % mmap.PAGESIZE):
    return None
  names = ['0'] * len(chunk[1:])
  return Files([path.joinpath('c', str(n), *names) for n in range(count)], each)


def _array_spec(path: Path, spec: jax.ShapeDtypeStruct) -> dict[str, Any]:
  return {
    'driver': 'zarr3',
    'kvstore': {'driver': 'file', 'path': f'{path}/'},
    'metadata': {
      'shape': list(spec.shape),
      'data_type': np.dtype(spec.dtype).name,
      'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}],
    },
    # Of an array that is new.
    'schema': {
      'chunk_layout': {'chunk': {'shape_soft_constraint': _chunk_of(spec)}}
    },
    # Else a lost chunk reads as zeros, and zeros are not written.
    'fill_missing_data_reads': False,
    'store_data_equal_to_fill_value': True,
  }


def _chunk_of(spec: jax.ShapeDtypeStruct) -> list[int]:
  """Returns the shape of a file's part of an array: some of a matrix's rows, or
  of all rows of a cache some.

  Of a matrix's as many as fill large pages, or else small ones, so that its
  files can be mapped one after the other.
  """
  chunk, cached = list(spec.shape), len(spec.shape) > 3
  axis = len(chunk) + _ROWS_AXIS if cached else 0
  row = int(np.prod(chunk)) * np.dtype(spec.dtype).itemsize // chunk[axis]
  target = DISK_CACHE_CHUNK if cached else _CHUNK_BYTES
  rows = max(1, target // row)
  for page in () if cached else (_HUGE_PAGE, _PAGE):
    whole = page // math.gcd(row, page)  # the fewest rows that fill pages
    if whole <= rows:
      rows -= rows % whole
      break
  chunk[axis] = min(chunk[axis], rows)
  return chunk


def _stored_chunk(array: ts.TensorStore) -> tuple[int, ...]:
  """Returns the shape of what a file of an array holds."""
  shape: Any = array.chunk_layout.read_chunk.shape
  return shape


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
