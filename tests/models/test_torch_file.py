"""PyTorch files against PyTorch, and against those who mean harm."""

import collections
import contextlib
import io
import os
import pickle
import random
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from flexjax.errors import InputError
from flexjax.models import tensor_file
from flexjax.models.torch_file import open_torch

DTYPES = (
  torch.float64,
  torch.float32,
  torch.float16,
  torch.bfloat16,
  torch.int64,
  torch.int32,
  torch.int16,
  torch.int8,
  torch.uint8,
  torch.bool,
)


def save(value, path, **how):
  torch.save(value, path, **how)
  return path


def assert_equal(ours, theirs):
  assert ours.shape == tuple(theirs.shape)
  assert ours.dtype.name == str(theirs.dtype).removeprefix('torch.')
  rows = ours.rows(0, ours.shape[0])
  assert rows.flags.c_contiguous
  wide = torch.float64 if theirs.is_floating_point() else torch.int64
  np.testing.assert_array_equal(
    rows.astype(str(wide).removeprefix('torch.')), theirs.to(wide).numpy()
  )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_dtypes(tmp_path, dtype):
  value = (torch.randn(7, 5) * 3).to(dtype)
  (name, ours), *rest = open_torch(save({'x': value}, tmp_path / 'f')).items()
  assert (name, rest) == ('x', [])
  assert_equal(ours, value)


BASE = torch.arange(6 * 8 * 10, dtype=torch.float32).reshape(6, 8, 10)
VIEWS = {
  'whole': BASE,
  'rows': BASE[2:5],
  'columns': BASE[:, 1:3],
  'every other': BASE[::2, :, ::3],
  'transposed': BASE.permute(2, 0, 1),
  'matrix transposed': BASE[0].t(),
  'one row': BASE[3],
  'vector': BASE[3, 2],
  'strided vector': BASE[3, :, 2],
  'expanded': BASE[0, 0, :1].expand(7),
  'overlapping': torch.as_strided(BASE, (5, 4), (1, 1), 3),
  'empty': BASE[:0],
  'length one': BASE[:1, :1],
}


@pytest.mark.parametrize('slab', [4, 64, 2**20])
def test_views_share_their_storage(tmp_path, monkeypatch, slab):
  monkeypatch.setattr(tensor_file, '_SLAB_BYTES', slab)
  path = save(VIEWS, tmp_path / 'f')
  assert path.stat().st_size < 2 * BASE.nbytes + 4000
  ours = open_torch(path)
  assert list(ours) == list(VIEWS)
  for name, theirs in VIEWS.items():
    assert_equal(ours[name], theirs)
    for begin in range(len(theirs)):
      for end in range(begin, len(theirs) + 1):
        np.testing.assert_array_equal(
          ours[name].rows(begin, end), theirs[begin:end], err_msg=name
        )


def test_what_state_dicts_look_like(tmp_path):
  module = torch.nn.Linear(3, 4)
  for value in (
    module.state_dict(),  # with _metadata
    collections.OrderedDict(module.named_parameters()),
    module.state_dict(keep_vars=True),
  ):
    ours = open_torch(save(value, tmp_path / 'f'))
    assert_equal(ours['weight'], module.weight.detach())
    assert_equal(ours['bias'], module.bias.detach())


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
  path = save({'x': BASE}, tmp_path / 'f', pickle_protocol=protocol)
  assert_equal(open_torch(path)['x'], BASE)


def test_format_before_1_6_is_refused(tmp_path):
  path = save({'x': BASE}, tmp_path / 'f', _use_new_zipfile_serialization=False)
  with pytest.raises(InputError, match=r"PyTorch's format before 1\.6"):
    open_torch(path)


class Call:
  """Pickles to a call of anything."""

  def __init__(self, *what):
    self.what = what

  def __reduce__(self):
    return self.what[0], self.what[1:]


@pytest.mark.parametrize(
  ('value', 'name'),
  [
    (Call(os.system, 'touch owned'), r'(posix|nt)\.system'),
    (Call(eval, '1'), r'__builtin__\.eval'),
    (Call(subprocess.Popen, 'true'), r'\w+\.Popen'),
    (Call(getattr, 'x', 'y'), r'__builtin__\.getattr'),
    (np.zeros(3), r'numpy'),
    (torch.nn.Linear(2, 2), r'torch\.nn\.modules\.linear\.Linear'),
    (torch.device('cpu'), r'torch\.device'),
  ],
)
@pytest.mark.parametrize('wrap', [lambda v: v, lambda v: {'x': v}])
def test_other_globals_are_refused_by_name(tmp_path, value, name, wrap):
  path = save(wrap(value), tmp_path / 'f')
  with pytest.raises(InputError, match=name + '.* refused'):
    open_torch(path)


@pytest.mark.parametrize(
  'value',
  [
    3,
    [BASE],
    BASE,
    {'x': 3},
    {3: BASE},
    {'state_dict': {'x': BASE}},
    {'x': [BASE]},
    collections.OrderedDict(x=None),
  ],
)
def test_anything_but_a_state_dict(tmp_path, value):
  with pytest.raises(InputError, match='no state dict'):
    open_torch(save(value, tmp_path / 'f'))


def rewrite(path, change=None, compression=zipfile.ZIP_STORED, drop=''):
  """Writes the members anew; `change` edits the pickle."""
  with zipfile.ZipFile(path) as old:
    members = {n: old.read(n) for n in old.namelist()}
  with zipfile.ZipFile(path, 'w', compression) as new:
    for name, data in members.items():
      if change and name.endswith('data.pkl'):
        data = change(data)
      if not drop or not name.endswith(drop):
        new.writestr(name, data)
  return path


def test_members_need_no_alignment(tmp_path):
  path = rewrite(save({'x': BASE}, tmp_path / 'f'))
  assert_equal(open_torch(path)['x'], BASE)


def test_compressed(tmp_path):
  path = save({'x': BASE}, tmp_path / 'f')
  with pytest.raises(InputError, match='compressed'):
    open_torch(rewrite(path, compression=zipfile.ZIP_DEFLATED))


def test_missing_storage(tmp_path):
  path = save({'x': BASE}, tmp_path / 'f')
  with pytest.raises(InputError, match="lacks its member 'f/data/0'"):
    open_torch(rewrite(path, drop='data/0'))
  with pytest.raises(InputError, match=r'not of torch\.save'):
    open_torch(rewrite(path, drop='data.pkl'))


class Pickler(pickle.Pickler):
  """Writes what torch.save would, with numbers of one's own."""

  def persistent_id(self, obj):
    return obj[1:] if isinstance(obj, tuple) and obj[:1] == ('pid',) else None


def forged(path, pid, first=0, shape=(6, 80), strides=(80, 1)):
  """Writes a file whose one tensor is a view with the given numbers."""
  save({'x': BASE}, path)
  arguments = (('pid', *pid), first, shape, strides, False, {})
  data = io.BytesIO()
  rebuild = torch._utils._rebuild_tensor_v2
  Pickler(data, 2).dump({'x': Call(rebuild, *arguments)})
  return rewrite(path, lambda _: data.getvalue())


PID = ('storage', torch.FloatStorage, '0', 'cpu', 480)


def test_forged_file_with_true_numbers(tmp_path):
  path = forged(tmp_path / 'f', PID)
  assert_equal(open_torch(path)['x'], BASE.reshape(6, 80))


@pytest.mark.parametrize(
  'change',
  [
    {'first': 1},
    {'first': -1},
    {'shape': (7, 80)},
    {'shape': (-6, -80)},
    {'shape': (6.0, 80)},
    {'shape': (6, 80, 2)},
    {'shape': (2**40, 2**40)},
    {'strides': (81, 1)},
    {'strides': (-80, 1)},
    {'strides': (80,)},
    {'strides': None},
    {'pid': (*PID[:4], 481)},
    {'pid': (*PID[:4], -1)},
    {'pid': (*PID[:4], 480.0)},
    {'pid': (*PID[:2], '1', *PID[3:])},
    {'pid': ('storage', torch.DoubleStorage, *PID[2:])},
    {'pid': ('module', *PID[1:])},
    {'pid': PID[:4]},
    {'pid': ('storage', 'x', *PID[2:])},
  ],
  ids=str,
)
def test_numbers_out_of_bounds(tmp_path, change):
  path = forged(tmp_path / 'f', **{'pid': PID} | change)
  with pytest.raises(InputError, match=str(path)):
    open_torch(path)


def test_truncated_anywhere(tmp_path):
  path = save({'x': BASE}, tmp_path / 'f')
  data = path.read_bytes()
  for keep in range(0, len(data), 17):
    path.write_bytes(data[:keep])
    with pytest.raises(InputError, match=str(path)):
      open_torch(path)


def test_damaged_anywhere(tmp_path):
  """A flipped byte is refused or read; it never escapes as another error."""
  path = save({'x': BASE}, tmp_path / 'f')
  data = path.read_bytes()
  pick = random.Random(0)
  for _ in range(500):
    at = pick.randrange(len(data))
    path.write_bytes(data[:at] + bytes([pick.randrange(256)]) + data[at + 1 :])
    with contextlib.suppress(InputError):
      for tensor in open_torch(path).values():
        tensor.rows(0, tensor.shape[0])


def test_missing_file(tmp_path):
  with pytest.raises(InputError, match='cannot read'):
    open_torch(tmp_path / 'none')
