"""Formats of weights: which tensors are packed, and into what shape."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.config import ModelConfig, Packing
from flexjax.errors import InputError
from flexjax.models import opt
from flexjax.quant import groupwise
from flexjax.runtime import formats
from flexjax.runtime.formats import Format, PackedSource
from flexjax.typing import Piece

MATRICES = {'qkv', 'out', 'fc1', 'fc2'}


def config(**changes):
  sizes = {'hidden_size': 128, 'ffn_size': 512, 'embed_size': 128}
  sizes |= {'num_layers': 2, 'num_heads': 2, 'vocab_size': 100}
  return ModelConfig(**{**sizes, **changes})


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_unpacked(dtype):
  c = config(embed_size=64, tied_head=False)
  specs = Format(dtype).specs(c)
  shapes = [{n: s.shape for n, s in spec.items()} for spec in specs]
  assert shapes == [dict(group) for group in opt.weight_groups(c)]
  assert {s.dtype for spec in specs for s in spec.values()} == {
    jnp.dtype(dtype)
  }


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('group_size', [32, 64, 128])
def test_packed(bits, group_size):
  """The four matrices of a layer are, along their last axis; nothing else."""
  c = config(embed_size=64, tied_head=False)
  specs = Format('bfloat16', Packing(bits, group_size)).specs(c)
  assert len(specs) == 2 * c.num_layers + 3
  seen = set()
  for spec, shapes in zip(specs, opt.weight_groups(c), strict=True):
    assert spec.keys() == shapes.keys()
    for name, s in spec.items():
      seen.add(name)
      if name in MATRICES:
        rows, size = shapes[name]
        row = size * bits // 8 + 4 * (size // group_size)
        assert (s.shape, s.dtype) == ((rows, row), np.uint8), name
      else:
        assert (s.shape, s.dtype) == (shapes[name], jnp.bfloat16), name
  others = {'table', 'positions', 'project_in', 'project_out', 'vectors'}
  assert seen == MATRICES | others


def test_matrix_that_cannot_be_divided():
  """Groups of 64 to 128, even: none divides 130; the matrix is named."""
  packing = Packing(4, 64)
  with pytest.raises(InputError, match=r'fc2.*\b4 bits.*\b130\b'):
    Format('bfloat16', packing).specs(config(ffn_size=130))
  c = config(hidden_size=130, embed_size=130)
  with pytest.raises(InputError, match=r'qkv.*\b130\b'):
    Format('bfloat16', packing).specs(c)
  assert Format('bfloat16').specs(c)
  # Tables are not packed, so that their width may be any.
  assert Format('bfloat16', packing).specs(config(embed_size=130))


FORMATS = [
  Format('float32'),
  Format('bfloat16', Packing(4, 64)),
  Format('float16', Packing(8, 32), 'minmax'),
  Format('bfloat16', Packing(4, 128), 'search'),
]


@pytest.mark.parametrize('form', FORMATS, ids=str)
def test_json(form):
  fields = form.to_json()
  assert fields['dtype'] == form.dtype
  assert fields['weight_bits'] == form.packing.bits
  if form.packing.packs:
    assert fields['group_size'] == form.packing.group_size
    assert fields['rounding'] == form.rounding
    assert fields['axis']
  assert Format.from_json(fields) == form


class Rows:
  """A source of one matrix and one table, in pieces of five rows."""

  fingerprint = 'rows'

  def __init__(self, matrix):
    self.matrix = matrix

  def pieces(self, group, dtype):
    for name in ('fc1', 'table'):
      for row in range(0, len(self.matrix), 5):
        piece = self.matrix[row : row + 5].astype(dtype)
        yield Piece(name, row, piece)


@pytest.mark.parametrize('rounding', ['search', 'minmax'])
def test_source_packs_matrices_piece_by_piece(monkeypatch, rounding):
  """What is packed depends on neither pieces nor chunks."""
  matrix = np.random.default_rng(0).normal(size=(13, 128))
  form = Format('bfloat16', Packing(4, 64), rounding)
  expected = groupwise.pack(
    jnp.asarray(matrix, 'bfloat16'),
    form.packing,
    groupwise.ROUNDINGS[rounding],
  )
  for chunk in (128, 3 * 128, 10**6):
    monkeypatch.setattr(formats, '_CHUNK_ELEMENTS', chunk)
    source = PackedSource(Rows(matrix), form, [{}])
    assert source.fingerprint == 'rows'
    packed = np.zeros(expected.shape, np.uint8)
    table = np.zeros(matrix.shape, jnp.bfloat16)
    for name, row, array in source.pieces(0, jnp.dtype('bfloat16')):
      out = packed if name == 'fc1' else table
      assert array.dtype == out.dtype
      out[row : row + len(array)] = array
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(table, matrix.astype(jnp.bfloat16))
