"""Every tier: what is written is what is read, and every byte is counted."""

import os
import subprocess
import sys
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from flexjax.errors import InputError
from flexjax.tiers import disk as disk_lib
from flexjax.tiers.base import At
from flexjax.tiers.device import DeviceTier
from flexjax.tiers.disk import DiskTier
from flexjax.tiers.host import HostTier

KEY = ('cache', 1, 0)
SHAPE = (2, 3, 9, 4)  # [B, N, S, H]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def device():
  return SingleDeviceSharding(jax.devices('cpu')[0])


def pinned():
  return SingleDeviceSharding(jax.devices('cpu')[0], memory_kind='pinned_host')


KINDS = {
  'device': lambda root: DeviceTier(device()),
  'host': lambda root: HostTier(device(), device()),
  'pinned host': lambda root: HostTier(pinned(), device()),
  'disk': lambda root: DiskTier(root, device(), device()),
  'disk by pinned host': lambda root: DiskTier(root, pinned(), device()),
}


@pytest.fixture(params=KINDS)
def tier(request, tmp_path):
  made = KINDS[request.param](tmp_path / 'disk')
  yield made
  if isinstance(made, DiskTier):
    made.close()


@pytest.fixture
def disk(tmp_path):
  made = DiskTier(tmp_path / 'disk', device(), device())
  yield made
  made.close()


def spec(*shape, dtype=np.float32, names='kv'):
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name in names}


def value(*shape, dtype=np.float32, names='kv', seed=0):
  rng = np.random.default_rng(seed)
  return {n: rng.normal(size=shape).astype(dtype) for n in names}


def put(arrays):
  return jax.device_put(arrays, device())


def get(tier, key, rows=None):
  """Reads a key to NumPy copies."""
  pending = tier.read(key, rows)
  arrays = pending.result()
  for array in arrays.values():
    assert array.sharding == device(), 'reads end on the device'
  out = {name: np.array(array) for name, array in arrays.items()}
  pending.release()
  return out


def assert_same(actual, expected):
  assert set(actual) == set(expected)
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype
    np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('source', [put, dict], ids=['jax', 'numpy'])
def test_round_trip(tier, dtype, source):
  for key, shape in {KEY: SHAPE, ('hidden', 0): (2, 5, 4)}.items():
    tier.allocate(key, spec(*shape, dtype=dtype))
    for seed in range(3):
      written = value(*shape, dtype=dtype, seed=seed)
      tier.write(key, source(written))
      assert_same(get(tier, key), written)
  tier.wait()


def test_rows_at_their_place(tier):
  expected = value(*SHAPE)
  tier.allocate(KEY, spec(*SHAPE))
  tier.write(KEY, put({n: a[:, :, :5] for n, a in expected.items()}), At(2, 0))
  for row in range(5, 9):
    rows = {n: a[:, :, row : row + 1] for n, a in expected.items()}
    tier.write(KEY, put(rows), At(2, row))
    read = get(tier, KEY, row + 1)
    assert all(np.isfinite(array).all() for array in read.values())
    assert_same(
      {n: a[:, :, : row + 1] for n, a in read.items()},
      {n: a[:, :, : row + 1] for n, a in expected.items()},
    )
  assert_same(get(tier, KEY), expected)


def test_first_rows_are_sent_as_a_whole_value():
  tier = HostTier(pinned(), device())
  tier.allocate(KEY, spec(*SHAPE))
  tier.write(KEY, value(*SHAPE, seed=1))  # of an earlier block
  rows = value(*SHAPE[:2], 4, SHAPE[3])
  assert tier.sent_nbytes(KEY, rows, At(2, 0)) == tier.sizes[KEY]
  tier.write(KEY, put(rows), At(2, 0))
  padded = {
    n: np.pad(a, ((0, 0), (0, 0), (0, SHAPE[2] - 4), (0, 0)))
    for n, a in rows.items()
  }
  assert_same(get(tier, KEY), padded)
  one = {n: a[:, :, :1] for n, a in rows.items()}
  nbytes = sum(a.nbytes for a in one.values())
  assert tier.sent_nbytes(KEY, one, At(2, 4)) == nbytes


def test_weights_in_pieces(tier):
  key = ('weights', 3)
  expected = value(20, 6, names=('fc1', 'fc2'))
  tier.allocate(key, spec(20, 6, names=('fc1', 'fc2')))
  if not isinstance(tier, DiskTier):
    tier.write(key, expected)  # memory gets whole groups
  else:
    for name, array in expected.items():
      for row in (0, 7, 14):
        tier.write(key, {name: array[row : row + 7]}, At(0, row))
  tier.wait()
  assert_same(get(tier, key), expected)


def test_bytes(tier):
  one = 2 * 2 * 3 * 9 * 4 * 4
  assert (tier.nbytes, tier.peak_nbytes) == (0, 0)
  tier.allocate(KEY, spec(*SHAPE))
  assert tier.nbytes == one
  tier.allocate(('cache', 1, 1), spec(*SHAPE, dtype=np.float16))
  assert tier.nbytes == one + one // 2
  tier.write(KEY, put(value(*SHAPE)))
  get(tier, KEY)
  tier.free(KEY)
  tier.free(('cache', 1, 1))
  assert (tier.nbytes, tier.peak_nbytes) == (0, one + one // 2)
  with pytest.raises(KeyError):
    tier.read(KEY).result()


def test_hidden_states_that_shrink(tier):
  key = ('hidden', 0)
  tier.allocate(key, spec(2, 6, 4, names='x'))
  for seed, length in enumerate((6, 1, 1, 6, 3)):
    written = value(2, length, 4, names='x', seed=seed)
    tier.write(key, put(written))
    assert_same(get(tier, key), written)


def test_key_allocated_anew_with_another_shape(tier):
  """As caches are when a batch shrinks, and when the next block begins."""
  tier.allocate(KEY, spec(1, 3, 9, 4))
  tier.write(KEY, put(value(1, 3, 9, 4)))
  get(tier, KEY)
  tier.free(KEY)
  tier.allocate(KEY, spec(*SHAPE))
  expected = value(*SHAPE, seed=1)
  tier.write(KEY, put(expected), At(2, 0))
  assert_same(get(tier, KEY), expected)


def test_reads_stay_while_others_are_made(tier):
  """A buffer is not used again before it has been released."""
  keys = [('cache', 1, k) for k in range(4)]
  for k, key in enumerate(keys):
    tier.allocate(key, spec(*SHAPE))
    tier.write(key, put(value(*SHAPE, seed=k)))
  for _ in range(5):
    pending = [tier.read(key) for key in keys]
    held = [p.result() for p in pending]
    for k, arrays in enumerate(held):
      assert_same(
        {n: np.array(a) for n, a in arrays.items()}, value(*SHAPE, seed=k)
      )
    for p in pending:
      p.release()


def test_reused_buffers_wait_for_their_reader(disk):
  """What was computed from a read is right though its buffer goes on."""

  @jax.jit
  def slow(x):
    return jax.lax.fori_loop(0, 30, lambda n, y: y @ x / 100 + x, x)

  size = 200
  names = 'x'
  keys = [('weights', k) for k in range(6)]
  for k, key in enumerate(keys):
    disk.allocate(key, spec(size, size, names=names))
    disk.write(key, value(size, size, names=names, seed=k))
  disk.wait()
  results = []
  for _ in range(4):
    for key in keys:
      pending = disk.read(key)
      results.append(slow(pending.result()['x']))
      pending.release(results[-1])
  assert disk.host_nbytes < 6 * size * size * 4
  for n, result in enumerate(results):
    whole = put(value(size, size, names=names, seed=n % 6))
    np.testing.assert_array_equal(result, slow(whole['x']))


def test_write_after_which_the_source_goes(disk):
  disk.allocate(KEY, spec(*SHAPE))
  expected = value(*SHAPE)
  arrays = put(expected)
  disk.write(KEY, arrays)
  del arrays
  for n in range(20):
    put(value(*SHAPE, seed=n))  # would land where the source was
  assert_same(get(disk, KEY), expected)


def test_reads_follow_writes(disk):
  disk.allocate(KEY, spec(*SHAPE))
  for seed in range(20):
    disk.write(KEY, put(value(*SHAPE, seed=seed)))
    pending = disk.read(KEY)
    disk.write(KEY, put(value(*SHAPE, seed=seed)))
    arrays = {n: np.array(a) for n, a in pending.result().items()}
    assert_same(arrays, value(*SHAPE, seed=seed))
    pending.release()


def first_chunk(folder):
  return next(p for p in sorted(folder.glob('*/c/**/*')) if p.is_file())


def ended(function):
  """Runs it in a thread: fails where it hangs, returns what it raised."""
  raised = []

  def run():
    try:
      function()
    except BaseException as e:
      raised.append(e)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(20)
  assert not thread.is_alive(), 'hangs'
  return raised[0] if raised else None


def test_lost_chunk_is_an_error(disk):
  key = ('weights', 0)
  disk.allocate(key, spec(8, 4))
  disk.write(key, value(8, 4))
  disk.wait()
  first_chunk(disk.root / 'weights.0').unlink()
  pending = disk.read(key)
  assert isinstance(ended(pending.result), OSError)
  assert ended(pending.release) is None
  assert_same_after_error(disk)


def assert_same_after_error(disk):
  disk.allocate(('weights', 1), spec(8, 4))
  disk.write(('weights', 1), value(8, 4))
  assert_same(get(disk, ('weights', 1)), value(8, 4))


def test_short_chunk_is_an_error(disk):
  key = ('weights', 0)
  disk.allocate(key, spec(8, 4))
  disk.write(key, value(8, 4))
  disk.wait()
  chunk = first_chunk(disk.root / 'weights.0')
  chunk.write_bytes(chunk.read_bytes()[:-4])
  assert isinstance(ended(disk.read(key).result), OSError)


def test_error_of_a_write_is_raised(disk, monkeypatch):
  disk.allocate(KEY, spec(*SHAPE))

  def fail(*args):
    raise OSError('no space left')

  monkeypatch.setattr(disk, '_write', fail)
  disk.write(KEY, put(value(*SHAPE)))
  assert 'no space left' in str(ended(disk.wait))
  assert 'no space left' in str(ended(disk.read(KEY).result))


def test_weights_outlive_the_run(tmp_path):
  expected = value(8, 4)
  first = DiskTier(tmp_path, device(), device())
  first.allocate(('weights', 0), spec(8, 4))
  first.write(('weights', 0), expected)
  first.allocate(KEY, spec(*SHAPE))
  first.write(KEY, put(value(*SHAPE)))
  first.wait()
  assert len(list(tmp_path.glob('run-*'))) == 1
  first.close()
  assert [p.name for p in tmp_path.iterdir()] == ['weights.0']
  second = DiskTier(tmp_path, device(), device())
  second.allocate(('weights', 0), spec(8, 4))
  assert_same(get(second, ('weights', 0)), expected)
  second.close()


def test_folders_of_dead_runs_go(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', 'import os; print(os.getpid())'],
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  dead = tmp_path / f'run-{int(done.stdout)}-0123abcd'
  alive = tmp_path / f'run-{os.getpid()}-0123abcd'
  for folder in (dead, alive):
    folder.mkdir()
  DiskTier(tmp_path, device(), device()).close()
  assert [p.name for p in tmp_path.iterdir()] == [alive.name]


@pytest.mark.parametrize('name', ['run-my-results', 'run-0-x', 'run--x'])
def test_other_folders_stay(tmp_path, name):
  (tmp_path / name).mkdir()
  DiskTier(tmp_path, device(), device()).close()
  assert (tmp_path / name).exists()


def test_root_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  for root in (tmp_path / 'file', tmp_path / 'file' / 'x'):
    with pytest.raises(InputError, match='cannot be written'):
      DiskTier(root, device(), device())


def test_cache_in_several_chunks(disk, monkeypatch):
  """Rows that were never written are not asked for."""
  monkeypatch.setattr(disk_lib, 'DISK_CACHE_CHUNK', 200)
  expected = value(*SHAPE)
  disk.allocate(KEY, spec(*SHAPE))
  disk.write(KEY, put({n: a[:, :, :3] for n, a in expected.items()}), At(2, 0))
  for row in range(3, 9):
    read = get(disk, KEY, row)
    assert_same(
      {n: a[:, :, :row] for n, a in read.items()},
      {n: a[:, :, :row] for n, a in expected.items()},
    )
    rows = {n: a[:, :, row : row + 1] for n, a in expected.items()}
    disk.write(KEY, put(rows), At(2, row))
  assert_same(get(disk, KEY), expected)


def test_pinned_memory_is_where_values_live(tmp_path):
  tier = HostTier(pinned(), device())
  assert tier.moves
  assert not HostTier(device(), device()).moves
  tier.allocate(KEY, spec(*SHAPE))
  expected = value(*SHAPE)
  tier.write(KEY, put(expected), At(2, 0))
  tier.wait()
  rows = {n: -a[:, :, :1] for n, a in expected.items()}
  tier.write(KEY, put(rows), At(2, 4))
  for name, array in tier._values[KEY].items():
    assert array.sharding.memory_kind == 'pinned_host'
    expected[name][:, :, 4:5] = rows[name]
  assert_same(get(tier, KEY), expected)
