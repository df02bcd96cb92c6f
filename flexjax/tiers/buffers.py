"""Where reads from a disk end: buffers that are used again, or the files
themselves, mapped into memory.

Hides alignment, the system's calls, and when memory may be used again.
"""

import ctypes
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

_ALIGNMENT = 64  # bytes: what XLA wants of a buffer it uses in place
_PROT_NONE = 0
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MAP_FIXED = 0x10  # Linux and macOS
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22  # Linux; the second from 5.14 on
_HUGE_PAGE = 2**21


class Files(NamedTuple):
  """Files of `each` bytes that hold an array, one after the other: whole pages
  where there are several."""

  paths: Sequence[Path]
  each: int

  def mapped(self, nbytes: int) -> np.ndarray:
    """Returns the first [nbytes] uint8 of them: the system's own copy, already
    read in, for as long as anyone refers to it.

    Raises:
      OSError: a file is missing or of another size, or cannot be read.
    """
    total = self.each * len(self.paths)
    room = total + _HUGE_PAGE
    first = _map(None, room, _PROT_NONE, _ANONYMOUS, -1)
    begin = first + -first % _HUGE_PAGE
    memory = (ctypes.c_ubyte * nbytes).from_address(begin)
    # Not at exit, when threads may still compute with it.
    weakref.finalize(memory, _libc().munmap, first, room).atexit = False
    for n, path in enumerate(self.paths):
      number = os.open(path, os.O_RDONLY)
      try:
        if (size := os.fstat(number).st_size) != self.each:
          raise OSError(f"'{path}' has {size} bytes, not {self.each}")
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(begin + n * self.each, self.each, mmap.PROT_READ, flags, number)
      finally:
        os.close(number)
    # What comes from the disk for the first time goes into large pages, where
    # the system has them, and takes next to nothing to map from then on.
    _libc().madvise(begin, total, _MADV_HUGEPAGE)
    if _libc().madvise(begin, total, _MADV_POPULATE_READ):
      raise _error()
    view = np.ctypeslib.as_array(memory)
    view.flags.writeable = False
    return view


@functools.cache
def can_map() -> bool:
  """Whether this system can read mapped files in: else that would be left to
  whoever computes with them."""
  page = _map(None, mmap.PAGESIZE, mmap.PROT_READ, _ANONYMOUS, -1)
  known = _libc().madvise(page, mmap.PAGESIZE, _MADV_POPULATE_READ) == 0
  _libc().munmap(page, mmap.PAGESIZE)
  return known


class Buffers:
  """NumPy arrays by shape, each with what must end before its memory may be
  used again.

  Attributes:
    nbytes: bytes of all of them, those that wait for a use included.
  """

  def __init__(self) -> None:
    self.nbytes = 0
    self._free: dict[Any, list[tuple[np.ndarray, list[jax.Array]]]] = {}
    self._lock = threading.Lock()

  def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an aligned array to fill; it holds what its last user left."""
    size = int(np.prod(shape)) * dtype.itemsize
    view = self._freed((shape, dtype, True), size)
    return _aligned(size).view(dtype).reshape(shape) if view is None else view

  def take_files(
    self, shape: tuple[int, ...], dtype: np.dtype, files: Files
  ) -> np.ndarray:
    """Returns what files hold, read-only: as many at a time as there would be
    buffers of that shape. What was mapped before stays until JAX, too, has let
    go of it.

    Raises:
      OSError: see `Files.mapped`.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    self._freed((shape, dtype, False), size)
    try:
      return files.mapped(size).view(dtype).reshape(shape)
    except OSError:
      with self._lock:
        self.nbytes -= size
      raise

  def _freed(self, kind: Any, size: int) -> np.ndarray | None:
    """Returns an array that was given back, when its memory may be used again;
    None where there is none, and one more has been counted."""
    with self._lock:
      free = self._free.setdefault(kind, [])
      view, fence = free.pop(0) if free else (None, [])
      if view is None:
        self.nbytes += size
    jax.block_until_ready(fence)
    return view

  def give(self, view: np.ndarray, fence: list[jax.Array]) -> None:
    """Takes an array back, for use when `fence` is computed."""
    kind = view.shape, view.dtype, view.flags.writeable
    with self._lock:
      self._free.setdefault(kind, []).append((view, fence))

  def keep(self, kinds: set[tuple[tuple[int, ...], np.dtype]]) -> None:
    """Drops those that wait and are of any other (shape, dtype)."""
    with self._lock:
      for kind in [k for k in self._free if k[:2] not in kinds]:
        for view, _ in self._free.pop(kind):
          self.nbytes -= view.nbytes


def _aligned(size: int) -> np.ndarray:
  # Zeros, because rows that are masked must still be finite.
  raw = np.zeros(size + _ALIGNMENT, np.uint8)
  begin = -raw.ctypes.data % _ALIGNMENT
  return raw[begin : begin + size]


@functools.cache
def _libc() -> ctypes.CDLL:
  libc = ctypes.CDLL(None, use_errno=True)
  libc.mmap.restype = address = ctypes.c_void_p
  size, number = ctypes.c_size_t, ctypes.c_int
  libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
  libc.munmap.argtypes = (address, size)
  libc.madvise.argtypes = (address, size, number)
  return libc


def _map(begin: int | None, size: int, access: int, flags: int, file: int):
  address = _libc().mmap(begin, size, access, flags, file, 0)
  if address == ctypes.c_void_p(-1).value:
    raise _error()
  return address


def _error() -> OSError:
  number = ctypes.get_errno()
  return OSError(number, os.strerror(number))
