"""Files are used where they lie, and memory only when nobody needs it."""

import errno
import gc
import mmap
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from flexjax.tiers import buffers
from flexjax.tiers import disk as disk_lib
from flexjax.tiers.buffers import Buffers, Files
from flexjax.tiers.disk import DiskTier

FLOAT32 = np.dtype(np.float32)
linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


def make_files(folder, count, each=mmap.PAGESIZE):
  content = np.random.default_rng(0).integers(0, 256, (count, each), np.uint8)
  paths = [folder / str(n) for n in range(count)]
  for path, part in zip(paths, content, strict=True):
    path.write_bytes(part.tobytes())
  return Files(paths, each), content.reshape(-1)


def is_mapped(path):
  gc.collect()
  return str(path) in Path('/proc/self/maps').read_text()


@pytest.mark.parametrize(('count', 'each'), [(1, 100), (1, 5000), (3, 2**16)])
def test_files_lie_one_after_the_other(tmp_path, count, each):
  files, content = make_files(tmp_path, count, each)
  for nbytes in (count * each, count * each - 8):
    view = files.mapped(nbytes)
    np.testing.assert_array_equal(view, content[:nbytes])
    with pytest.raises(ValueError, match='read-only'):
      view[0] = 1


@linux
def test_files_are_mapped_as_long_as_anyone_refers_to_them(tmp_path):
  files, content = make_files(tmp_path, 2)
  part = files.mapped(len(content)).view(FLOAT32).reshape(2, -1)[1:]
  assert all(map(is_mapped, files.paths))
  assert part.tobytes() == content[mmap.PAGESIZE :].tobytes()
  del part
  assert not any(map(is_mapped, files.paths))


@linux
@pytest.mark.parametrize(
  ('damage', 'expected'),
  [
    (Path.unlink, 'No such file'),
    (lambda path: path.write_bytes(b'short'), 'has 5 bytes'),
    (lambda path: path.write_bytes(bytes(mmap.PAGESIZE + 1)), 'bytes, not'),
  ],
)
def test_damaged_files_are_an_error_and_nothing_stays(
  tmp_path, damage, expected
):
  files, content = make_files(tmp_path, 3)
  damage(files.paths[1])
  with pytest.raises(OSError, match=expected):
    files.mapped(len(content))
  assert not is_mapped(files.paths[0])


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EFAULT])
def test_a_system_that_cannot_read_ahead(tmp_path, monkeypatch, number):
  """It may not know how, and then reads later; or the disk may fail."""
  files, content = make_files(tmp_path, 2)
  error = OSError(number, 'of the system')
  monkeypatch.setattr(buffers, '_error', lambda: error)
  monkeypatch.setattr(buffers, '_MADV_POPULATE_READ', 12345)
  if number == errno.EINVAL:
    np.testing.assert_array_equal(files.mapped(len(content)), content)
  else:
    with pytest.raises(OSError, match='of the system'):
      files.mapped(len(content))


def test_what_is_given_back_is_taken_again(tmp_path):
  room = Buffers()
  first = room.take((4, 8), FLOAT32)
  assert first.ctypes.data % 64 == 0
  other = room.take((4, 8), FLOAT32)
  assert room.nbytes == 256
  room.give(first, [])
  assert room.take((4, 8), FLOAT32) is first
  files, _ = make_files(tmp_path, 1, 128)
  room.give(other, [])
  mapped = room.take((4, 8), FLOAT32, files)
  assert not mapped.flags.writeable
  assert room.nbytes == 384
  room.give(mapped, [])
  del mapped
  room.take((4, 8), FLOAT32, files)
  assert room.take((4, 8), FLOAT32) is other
  assert room.nbytes == 384


@linux
def test_what_was_mapped_goes_before_the_next_is(tmp_path):
  room = Buffers()
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
  old, _ = make_files(tmp_path / 'a', 1)
  new, _ = make_files(tmp_path / 'b', 1)
  shape = (mmap.PAGESIZE // 4,)
  room.give(room.take(shape, FLOAT32, old), [])
  assert is_mapped(old.paths[0])
  room.take(shape, FLOAT32, new)
  assert not is_mapped(old.paths[0])
  room.give(room.take(shape, FLOAT32, new), [])
  room.keep({((3,), FLOAT32)})
  assert not is_mapped(new.paths[0])


def test_what_waits_of_other_shapes_is_dropped():
  room = Buffers()
  kept, dropped = (room.take((n,), FLOAT32) for n in (2, 3))
  room.give(kept, [])
  room.give(dropped, [])
  room.keep({((2,), FLOAT32)})
  assert room.nbytes == 8
  assert room.take((2,), FLOAT32) is kept


@linux
@pytest.mark.parametrize('rows', [1, 3, 8])  # 3: no whole pages, so a copy
def test_weights_are_used_where_they_lie(tmp_path, monkeypatch, rows):
  """Of one file, of several with whole pages; copied from others."""
  width = mmap.PAGESIZE // 4  # half a page
  monkeypatch.setattr(disk_lib, '_CHUNK_BYTES', rows * 2 * width)
  if rows == 1:
    width *= 2
    monkeypatch.setattr(disk_lib, '_CHUNK_BYTES', 2 * width)
  shape, dtype = (8, width), ml_dtypes.bfloat16
  here = SingleDeviceSharding(jax.devices('cpu')[0])
  tier = DiskTier(tmp_path, here, here)
  key = ('weights', 0)
  value = np.random.default_rng(0).normal(size=shape).astype(dtype)
  tier.allocate(key, {'w': jax.ShapeDtypeStruct(shape, dtype)})
  tier.write(key, {'w': value})
  tier.wait()
  files = [p for p in (tmp_path / 'weights.0').rglob('c/**/*') if p.is_file()]
  assert len(files) == {1: 8, 3: 3, 8: 1}[rows]
  read = tier.read(key)
  array = read.result()['w']
  np.testing.assert_array_equal(np.asarray(array), value)
  assert all(is_mapped(path) == (rows != 3) for path in files)
  assert tier.host_nbytes == value.nbytes
  # What is computed with it may end later than whoever gave it back.
  doubled = jax.jit(lambda w: w + w)(array)
  read.release([doubled])
  del array, read
  np.testing.assert_array_equal(np.asarray(doubled), value + value)
  tier.close()
