"""Files are used where they lie, and memory only when nobody needs it."""

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
HUGE = buffers._MADV_HUGEPAGE
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


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
  files, content = make_files(tmp_path, 2)
  read_in = buffers._libc().madvise

  class Failing:
    mmap, munmap = buffers._libc().mmap, buffers._libc().munmap

    def madvise(self, begin, size, advice):
      return read_in(begin, size, advice if advice == HUGE else 12345)

  monkeypatch.setattr(buffers, '_libc', Failing)
  with pytest.raises(OSError, match='Invalid argument'):
    files.mapped(len(content))
  monkeypatch.undo()
  np.testing.assert_array_equal(files.mapped(len(content)), content)


def test_large_pages_are_no_need(tmp_path, monkeypatch):
  files, content = make_files(tmp_path, 2)
  monkeypatch.setattr(buffers, '_MADV_HUGEPAGE', 12345)
  np.testing.assert_array_equal(files.mapped(len(content)), content)


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
  mapped = room.take_files((4, 8), FLOAT32, files)
  assert not mapped.flags.writeable
  assert room.nbytes == 384
  room.give(mapped, [])
  room.take_files((4, 8), FLOAT32, files)
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
  view = room.take_files(shape, FLOAT32, old)
  array = jax.device_put(view, here())
  room.give(view, [array])
  del view, array
  assert is_mapped(old.paths[0])
  view = room.take_files(shape, FLOAT32, new)
  assert not is_mapped(old.paths[0])
  room.give(view, [])
  del view
  room.keep({((3,), FLOAT32)})
  assert not is_mapped(new.paths[0])
  assert room.nbytes == 0


def test_what_cannot_be_mapped_takes_no_room(tmp_path):
  room = Buffers()
  files, _ = make_files(tmp_path, 1)
  files.paths[0].unlink()
  for _ in range(3):
    with pytest.raises(OSError, match='No such file'):
      room.take_files((mmap.PAGESIZE // 4,), FLOAT32, files)
  assert room.nbytes == 0


def test_what_waits_of_other_shapes_is_dropped():
  room = Buffers()
  kept, dropped = (room.take((n,), FLOAT32) for n in (2, 3))
  room.give(kept, [])
  room.give(dropped, [])
  room.keep({((2,), FLOAT32)})
  assert room.nbytes == 8
  assert room.take((2,), FLOAT32) is kept


def here():
  return SingleDeviceSharding(jax.devices('cpu')[0])


def make_tier(folder, shape, dtype, count=1, names='w', host=None):
  """A tier with `count` weight groups, and their values."""
  tier = DiskTier(folder, host or here(), here())
  rng = np.random.default_rng(0)
  values = []
  for n in range(count):
    values.append({x: rng.normal(size=shape).astype(dtype) for x in names})
    spec = {x: jax.ShapeDtypeStruct(shape, dtype) for x in names}
    tier.allocate(('weights', n), spec)
    tier.write(('weights', n), values[-1])
  tier.wait()
  return tier, values


def files_of(folder):
  return [p for p in folder.rglob('c/**/*') if p.is_file()]


def is_among(array, path):
  """Whether an array's first number lies where a file is mapped."""
  address = array.unsafe_buffer_pointer()
  for line in Path('/proc/self/maps').read_text().splitlines():
    begin, end = (int(x, 16) for x in line.split()[0].split('-'))
    if begin <= address < end:
      return line.endswith(str(path))
  return False


@linux
@pytest.mark.parametrize(
  ('shape', 'count', 'in_place'),
  [
    ((8, 8192), 1, True),  # a file
    ((45, 8192), 4, True),  # several, the last not full
    ((4090, 80), 4, True),  # rows that fill pages together: 1024 of 160 bytes
    ((40, 10007), 5, False),  # rows that never do
    ((100,), 1, True),
  ],
)
def test_weights_are_used_where_they_lie(
  tmp_path, monkeypatch, shape, count, in_place
):
  monkeypatch.setattr(disk_lib, '_CHUNK_BYTES', 200_000)
  tier, (value,) = make_tier(tmp_path, shape, ml_dtypes.bfloat16)
  files = sorted(files_of(tmp_path), key=lambda p: int(p.parts[-len(shape)]))
  assert len(files) == count
  read = tier.read(('weights', 0))
  array = read.result()['w']
  np.testing.assert_array_equal(np.asarray(array), value['w'])
  assert is_among(array, files[0]) == in_place
  assert all(is_mapped(path) == in_place for path in files)
  assert tier.host_nbytes == value['w'].nbytes
  read.release()
  tier.close()
  del read, array
  assert not any(map(is_mapped, files))


@linux
@pytest.mark.parametrize('names', ['w', 'vw'])
def test_a_file_that_is_computed_with_stays_mapped(tmp_path, names):
  """Also where its place is given to the next one meanwhile."""
  tier, values = make_tier(tmp_path, (512, 512), FLOAT32, 2, names)
  power = jax.jit(
    lambda w: jax.lax.fori_loop(0, 30, lambda _, x: jax.numpy.tanh(x @ w), w)
  )
  one = tier.read(('weights', 0))
  slow = power(one.result()['w'])
  one.release([slow])
  del one
  other = tier.read(('weights', 1))
  for name, array in other.result().items():
    np.testing.assert_array_equal(np.asarray(array), values[1][name])
  assert slow.is_ready()
  np.testing.assert_array_equal(slow, power(values[0]['w']))
  assert not any(map(is_mapped, files_of(tmp_path / 'weights.0')))
  other.release()
  assert tier.host_nbytes == len(names) * 2**20
  tier.close()


def test_where_files_are_copied(tmp_path, monkeypatch):
  """To an accelerator, or on a system that cannot read what it maps in."""
  pinned = here().with_memory_kind('pinned_host')
  for folder, host, able in (('a', pinned, True), ('b', here(), False)):
    monkeypatch.setattr(disk_lib, 'can_map', lambda able=able: able)
    tier, (value,) = make_tier(tmp_path / folder, (8, 4096), FLOAT32, host=host)
    array = tier.read(('weights', 0)).result()['w']
    np.testing.assert_array_equal(np.asarray(array), value['w'])
    assert not any(map(is_mapped, files_of(tmp_path)))
    tier.close()


@pytest.mark.parametrize('mapped', [True, False])
def test_reads_that_fail_take_no_room(tmp_path, monkeypatch, mapped):
  monkeypatch.setattr(disk_lib, 'can_map', lambda: mapped)
  tier, _ = make_tier(tmp_path, (8, 4096), FLOAT32, names='vw')
  (tmp_path / 'weights.0' / 'w' / 'c' / '0' / '0').unlink()
  for _ in range(3):
    with pytest.raises(OSError, match='cannot be read'):
      tier.read(('weights', 0)).result()
  assert tier.host_nbytes <= 2 * 8 * 4096 * 4
  tier.close()


def test_arrays_of_other_chunks_are_read(tmp_path, monkeypatch):
  """A folder keeps the chunks that it was written with."""
  shape = (100, 80)
  monkeypatch.setattr(disk_lib, '_CHUNK_BYTES', 4000)
  tier, (value,) = make_tier(tmp_path, shape, FLOAT32)
  tier.close()
  assert len(files_of(tmp_path)) > 1
  monkeypatch.undo()
  tier = DiskTier(tmp_path, here(), here())
  spec = {'w': jax.ShapeDtypeStruct(shape, FLOAT32)}
  tier.allocate(('weights', 0), spec)
  array = tier.read(('weights', 0)).result()['w']
  np.testing.assert_array_equal(np.asarray(array), value['w'])
  pieces = list(disk_lib.read_pieces(tmp_path, ('weights', 0), spec))
  assert len(pieces) == len(files_of(tmp_path))
  tier.close()
