"""Groups of codes: what they lose, what they take, and where each bit lies."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexjax.config import Packing
from flexjax.errors import InputError
from flexjax.quant import groupwise
from flexjax.quant.groupwise import MINMAX, SEARCH

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}
EPSILON = 2.0**-24  # half a unit in the last place of float32, relatively
TINY = 1e-30  # what may be taken for zero
pack = jax.jit(groupwise.pack, static_argnums=(1, 2))
expand = jax.jit(groupwise.expand, static_argnums=(1, 2, 3, 4))


def kind_of(dtype):
  """The type of a scale and of a minimum."""
  return np.dtype(np.float16 if dtype == np.float16 else ml_dtypes.bfloat16)


def rounded_by(x, dtype):
  """At most how far |x| is from the next number of a 16-bit type."""
  if dtype == np.float16:
    return np.maximum(np.abs(x) * 2.0**-11, 2.0**-25)
  return np.abs(x) * 2.0**-8 + TINY


def decode(row, packing, size, kind):
  """Reads one row as the layout is documented: (codes, scales, minima)."""
  row = bytes(np.asarray(row))
  group = packing.group(size)
  count, length = size // group, group * packing.bits // 8
  codes = np.zeros((count, group), int)
  for g in range(count):
    part = row[g * length : (g + 1) * length]
    if packing.bits == 8:
      codes[g] = list(part)
    else:
      codes[g] = [b % 16 for b in part] + [b // 16 for b in part]
  tail = row[count * length :]
  assert len(tail) == 2 * 2 * count
  scales = np.frombuffer(tail[: 2 * count], kind).astype(np.float64)
  minima = np.frombuffer(tail[2 * count :], kind).astype(np.float64)
  return codes, scales, minima


def decoded(packed, packing, size, kind):
  """Numbers in float64, [rows, groups, group], and a scale for each group."""
  parts = [decode(row, packing, size, kind) for row in packed]
  codes, scales, minima = (np.stack(p) for p in zip(*parts, strict=True))
  return codes * scales[..., None] + minima[..., None], scales


def in_groups(x, packing):
  x = np.asarray(x, np.float64)
  return x.reshape(len(x), -1, packing.group(x.shape[-1]))


def moderate(x, dtype):
  """Numbers of a type, finite, none but 0 below what may be flushed."""
  most = 60000 if dtype == np.float16 else 9.9e29
  x = np.clip(np.asarray(x, np.float64), -most, most)
  x = np.where(np.abs(x) < TINY, 0, x)
  return x.astype(np.float32).astype(dtype)


@st.composite
def rows(draw, size, dtype):
  """Two rows: any numbers, or a range of one size somewhere, with outliers."""
  shape = (2, size)
  if draw(st.booleans()):
    elements = st.floats(-1e30, 1e30)
    return moderate(
      draw(hnp.arrays(np.float64, shape, elements=elements)), dtype
    )
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  exponents = (
    st.integers(-7, 4) if dtype == np.float16 else st.integers(-28, 28)
  )
  scale, offset = 10.0 ** draw(exponents), 10.0 ** draw(exponents)
  normal = draw(st.booleans())
  x = rng.normal(size=shape) if normal else rng.random(shape)
  x = x * scale + offset * draw(st.sampled_from([0, 0, 1, -1]))
  for _ in range(draw(st.integers(0, 2))):
    at = draw(st.integers(0, 1)), draw(st.integers(0, size - 1))
    x[at] = draw(st.floats(-1e30, 1e30)) if draw(st.booleans()) else 9 * scale
  return moderate(x, dtype)


CASES = [
  (name, bits, group_size)
  for name in DTYPES
  for bits in (8, 4)
  for group_size in (32, 64, 128)
]


@pytest.mark.parametrize(('name', 'bits', 'group_size'), CASES)
@settings(deadline=None, max_examples=16, derandomize=True)
@given(data=st.data())
def test_round_trip(name, bits, group_size, data):
  """Within half a step, or what rounding moves the ends of the range by.

  Of a range [low, high] in steps of s, both `low` and s are rounded: the codes
  reach from low + a to high + a + (2**bits - 1) * b, |a| and |b| as rounded. A
  number between is off by half a step at most; one outside by how far the end
  has moved. Nothing else is lost but a few roundings of float32.
  """
  dtype, packing = DTYPES[name], Packing(bits, group_size)
  size = 2 * packing.group(group_size)
  x = data.draw(rows(size, dtype))
  packed = np.asarray(pack(x, packing, MINMAX))
  assert packed.dtype == np.uint8
  assert packed.shape == (2, packing.row_bytes(size, dtype.itemsize))
  values, scales = decoded(packed, packing, size, kind_of(dtype))
  true = in_groups(x, packing)
  low, high = true.min(-1), true.max(-1)
  step, levels = (high - low) / (2**bits - 1), 2**bits - 1
  moved = rounded_by(low, dtype) + levels * rounded_by(step, dtype)
  computed = 8 * EPSILON * np.abs(true).max(-1) + TINY
  assert (np.abs(scales - step) <= rounded_by(step, dtype) + computed).all()
  bound = np.maximum(scales / 2, moved) + computed
  assert (np.abs(values - true) <= bound[..., None]).all()
  # What expand makes of it: the same, rounded to the dtype.
  whole = np.asarray(expand(packed, packing, size, name))
  assert whole.dtype == dtype
  assert whole.shape == x.shape
  last = {'float32': EPSILON, 'bfloat16': 2.0**-8, 'float16': 2.0**-11}[name]
  off = np.abs(in_groups(whole, packing) - values)
  floor = 2.0**-25 if name == 'float16' else TINY
  assert (off <= last * np.abs(values) + computed[..., None] + floor).all()


@pytest.mark.parametrize(
  ('name', 'bits', 'group_size'),
  [('bfloat16', 4, 64), ('float16', 8, 32)],
)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_equal_numbers_are_exact(name, bits, group_size, data):
  dtype, packing = DTYPES[name], Packing(bits, group_size)
  elements = (
    st.floats(-60000, 60000) if name == 'float16' else (st.floats(-1e30, 1e30))
  )
  pair = moderate(data.draw(st.tuples(elements, elements)), dtype)
  x = np.repeat(pair, group_size)
  for rounding in (MINMAX, SEARCH):
    packed = pack(x, packing, rounding)
    whole = expand(packed, packing, len(x), name)
    np.testing.assert_array_equal(whole, x)


@pytest.mark.parametrize(
  ('name', 'bits', 'group_size'),
  [
    ('float32', 4, 64),
    ('float32', 8, 32),
    ('bfloat16', 4, 128),
    ('float16', 8, 64),
  ],
)
@settings(deadline=None, max_examples=16, derandomize=True)
@given(data=st.data())
def test_search_is_never_worse(name, bits, group_size, data):
  """Up to what squared errors lose in float32 themselves."""
  dtype, packing = DTYPES[name], Packing(bits, group_size)
  size = 2 * group_size
  x = data.draw(rows(size, dtype))
  true = in_groups(x, packing)
  errors = []
  for rounding in (SEARCH, MINMAX):
    values, _ = decoded(
      pack(x, packing, rounding), packing, size, kind_of(dtype)
    )
    errors.append(np.square(values - true).sum(-1))
  computed = np.square(8 * EPSILON * np.abs(true).max(-1))
  slack = group_size * (computed + 2.0**-126)  # squares below that are 0
  mixed = np.sqrt(errors[1] * slack)  # (e + d)**2 = e**2 + 2ed + d**2
  assert (errors[0] <= errors[1] * (1 + 1e-5) + 2 * mixed + slack).all()


def test_search_is_better():
  packing, rng = Packing(4, 64), np.random.default_rng(0)
  lost = {SEARCH: 0.0, MINMAX: 0.0}
  for x in rng.normal(size=(64, 2, 128)).astype(np.float32):
    for r in lost:
      whole = expand(pack(x, packing, r), packing, 128, 'float32')
      lost[r] += float(np.square(whole - x).sum())
  assert lost[SEARCH] < 0.9 * lost[MINMAX]


@pytest.mark.parametrize('kind', [ml_dtypes.bfloat16, np.float16])
def test_layout_of_four_bits(kind):
  """A row by hand: codes of all groups, then scales, then minima."""
  packing, dtype = Packing(4, 32), np.dtype(kind).name
  codes = np.random.default_rng(1).integers(0, 16, (2, 32))
  scales, minima = np.array([0.5, 2], kind), np.array([-3, 7], kind)
  row = b''
  for group in codes.tolist():
    row += bytes(
      low + 16 * high for low, high in zip(group[:16], group[16:], strict=True)
    )
  row += scales.tobytes() + minima.tobytes()
  assert len(row) == packing.row_bytes(64, 2) == 40
  whole = expand(np.frombuffer(row, np.uint8), packing, 64, dtype)
  expected = codes * np.array([[0.5], [2]]) + np.array([[-3], [7]])
  np.testing.assert_array_equal(
    np.asarray(whole, np.float64), expected.reshape(64)
  )


def test_layout_of_eight_bits():
  packing = Packing(8, 32)
  codes = np.random.default_rng(1).integers(0, 256, (2, 32))
  scales = np.array([0.5, 2], ml_dtypes.bfloat16)
  minima = np.array([-3, 7], ml_dtypes.bfloat16)
  row = bytes(codes.reshape(-1).tolist()) + scales.tobytes() + minima.tobytes()
  assert len(row) == packing.row_bytes(64, 2) == 72
  whole = expand(np.frombuffer(row, np.uint8), packing, 64, 'float32')
  expected = codes * np.array([[0.5], [2]]) + np.array([[-3], [7]])
  np.testing.assert_array_equal(whole, expected.reshape(64))


def test_numbers_on_the_grid_are_exact():
  """16 levels from a minimum on: nothing to round, in any order."""
  rng = np.random.default_rng(2)
  for name, dtype in DTYPES.items():
    x = np.stack([rng.permutation(np.arange(64) % 16) for _ in range(4)])
    x = (x * 0.25 - 1.5).astype(dtype).reshape(2, 128)
    for rounding in (MINMAX, SEARCH) if name == 'float32' else (MINMAX,):
      packed = pack(x, Packing(4, 64), rounding)
      whole = expand(packed, Packing(4, 64), 128, name)
      np.testing.assert_array_equal(np.asarray(whole), x)


@pytest.mark.parametrize('size', [32, 64, 80, 96, 128])
@pytest.mark.parametrize('bits', [8, 4])
def test_head_dimensions(size, bits):
  """Keys and values [B, N, S, H], in one piece, row by row and mapped."""
  packing = Packing(bits, 64)
  x = np.random.default_rng(size).normal(size=(2, 3, 5, size))
  x = x.astype(np.float32)
  packed = pack(x, packing, MINMAX)
  assert packed.shape == (2, 3, 5, packing.row_bytes(size, 2))
  whole = expand(packed, packing, size, 'float32')
  assert whole.shape == x.shape
  step = (x.max(-1) - x.min(-1)) / (2**bits - 1)
  lost = np.abs(whole - x).max(-1)
  assert (lost <= step / 2 + 2.0**-7 * (x.max(-1) - x.min(-1))).all()
  if size == 80 and bits == 4:
    one = functools.partial(groupwise.pack, packing=packing, rounding=MINMAX)
    many = jax.jit(jax.vmap(one))(x.reshape(-1, size))
    np.testing.assert_array_equal(many.reshape(packed.shape), packed)
    single = pack(x[1, 2, 3], packing, MINMAX)
    assert single.shape == (packing.row_bytes(size, 2),)
    np.testing.assert_array_equal(single, packed[1, 2, 3])
    back = expand(single, packing, size, 'float32')
    np.testing.assert_allclose(back, whole[1, 2, 3], rtol=0, atol=1e-6)


@pytest.mark.parametrize('size', [64, 80, 128, 768, 2048, 7168])
def test_bytes(size):
  four, eight = Packing(4, 64), Packing(8, 64)
  assert four.row_bytes(size, 2) <= 0.285 * 2 * size
  assert eight.row_bytes(size, 2) <= 0.535 * 2 * size
  assert Packing().row_bytes(size, 2) == 2 * size
  assert Packing().row_bytes(size, 4) == 4 * size
  x = jax.ShapeDtypeStruct((3, size), np.float32)
  for packing in (four, eight):
    made = jax.eval_shape(lambda x, p=packing: pack(x, p, MINMAX), x)
    assert made.shape == (3, packing.row_bytes(size, 4))
    assert made.dtype == np.uint8


@given(
  size=st.integers(1, 3000),
  group_size=st.sampled_from([32, 64, 128]),
  bits=st.sampled_from([8, 4]),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_groups(size, group_size, bits):
  """The smallest even divisor in reach; a shorter axis whole; or refused."""
  packing = Packing(bits, group_size)
  if size < group_size:
    fits = [size] if size % 2 == 0 else []
  else:
    reach = range(group_size, 2 * group_size + 1)
    fits = [n for n in reach if n % 2 == 0 and size % n == 0]
  if fits:
    assert packing.group(size) == fits[0]
    count = size // fits[0]
    assert packing.row_bytes(size, 4) == size * bits // 8 + 4 * count
    return
  with pytest.raises(InputError, match=rf'\b{size}\b'):
    packing.group(size)
  with pytest.raises(InputError):
    packing.row_bytes(size, 2)


def test_a_size_that_no_group_divides():
  x = np.zeros((2, 130), np.float32)  # 65 is odd, 130 beyond twice 64
  with pytest.raises(InputError, match='130'):
    groupwise.pack(x, Packing(4, 64), MINMAX)
  whole = pack(np.arange(100.0, dtype=np.float32), Packing(8, 64), MINMAX)
  assert whole.shape == (104,)  # one group of 100


@pytest.mark.parametrize('bits', [8, 4])
def test_largest_float16(bits):
  """Finite numbers stay finite: a rounded scale must not end beyond them."""
  packing = Packing(bits, 64)
  x = np.zeros((2, 128), np.float16)
  x[0, ::3] = x[1, ::5] = 65504
  x[1, 1::5] = -65504
  whole = np.asarray(expand(pack(x, packing, MINMAX), packing, 128, 'float16'))
  assert np.isfinite(whole).all()
  bound = 131008 * (0.5 / (2**bits - 1) + 2.0**-11) + 64
  assert np.abs(whole.astype(float) - x).max() <= bound


@pytest.mark.parametrize('name', ['bfloat16', 'float16'])
@pytest.mark.parametrize('bits', [8, 4])
def test_expanded_to_more_than_was_packed(name, bits):
  """The numbers are those of what was packed, not yet rounded to it."""
  packing = Packing(bits, 64)
  x = np.random.default_rng(0).normal(size=(3, 128)).astype(DTYPES[name])
  packed = pack(x, packing, MINMAX)
  wide = np.asarray(expand(packed, packing, 128, 'float32', name))
  assert wide.dtype == np.float32
  found = in_groups(wide, packing)
  values, _ = decoded(np.asarray(packed), packing, 128, kind_of(DTYPES[name]))
  np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)
