"""The kernels say what plain JAX says; interpreted where there is no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.config import Packing
from flexjax.models import attention
from flexjax.quant import groupwise, kernels

INTERPRET = jax.default_backend() == 'cpu'
SHAPES = [
  (2, 3, 37, 32, 'float32'),
  (1, 2, 150, 64, 'bfloat16'),
  (2, 2, 300, 128, 'float16'),
]


def draw(shape, dtype, seed=0):
  draws = np.random.default_rng(seed).normal(0, 1, shape)
  return jnp.asarray(draws, dtype)


def exact(q, k, v, bias):
  """Attended values in float32, by definition."""
  highest = jax.lax.Precision.HIGHEST
  scores = jnp.einsum('bnh,bnsh->bns', q, k, precision=highest) + bias
  p = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum('bns,bnsh->bnh', p, v, precision=highest)


def packed_cache(b, n, columns, size, dtype, packing):
  rows = [draw((b, n, columns, size), dtype, seed) for seed in (1, 2)]
  packed = [groupwise.pack(x, packing, groupwise.MINMAX) for x in rows]
  # The kernel does not round what it expands.
  plain = [groupwise.expand(x, packing, size, 'float32', dtype) for x in packed]
  return packed, plain


@pytest.mark.parametrize('rounds', [0, 2])
@pytest.mark.parametrize('shape', SHAPES)
def test_rows_are_packed_as_by_plain_jax(shape, rounds):
  *sizes, dtype = shape
  x = draw(sizes, dtype) * 3 + 1
  x = x.at[0, 0, :5].set(0.25)  # groups of equal numbers
  packing, rounding = Packing(4), groupwise.Rounding((1.0,), rounds)
  mine = kernels.pack(x, packing, rounding, interpret=INTERPRET)
  theirs = groupwise.pack(x, packing, rounding)
  assert mine.shape == theirs.shape
  if INTERPRET:
    assert (mine == theirs).all()
    return
  # XLA may keep more digits of a range than are stored; codes then differ.
  assert (mine == theirs).mean() > 0.95
  errors = [
    jnp.square(
      groupwise.expand(packed, packing, sizes[-1], dtype).astype(jnp.float32)
      - x.astype(jnp.float32)
    ).mean()
    for packed in (mine, theirs)
  ]
  assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize('group', [32, 64])
@pytest.mark.parametrize('shape', SHAPES)
def test_attention_is_that_to_the_expanded_cache(shape, group):
  b, n, columns, size, dtype = shape
  packing = Packing(4, group)
  (k, v), plain = packed_cache(b, n, columns, size, dtype, packing)
  q = draw((b, n, size), 'float32') * 0.1
  seen = jnp.arange(columns) >= jnp.arange(b)[:, None] * columns // 2
  bias = jnp.where(seen[:, None], draw((b, n, columns), 'float32', 3), -1e30)
  found = kernels.attend(q, k, v, bias, packing, dtype, interpret=INTERPRET)
  values = found.values / found.weight[..., None]
  np.testing.assert_allclose(
    values, exact(q, *plain, bias), rtol=1e-4, atol=1e-4
  )


def test_a_prompt_of_padding_alone_gets_the_new_token():
  packing = Packing(4)
  (k, v), _ = packed_cache(1, 2, 40, 32, 'float32', packing)
  q = draw((1, 2, 1, 32), 'float32')
  rows = {'k': draw(q.shape, 'float32', 4), 'v': draw(q.shape, 'float32', 5)}
  bias = jnp.full((1, 2, 40), kernels.MASKED)
  found = kernels.attend(
    q[:, :, 0], k, v, bias, packing, 'float32', interpret=INTERPRET
  )
  np.testing.assert_allclose(
    attention.join(q, rows, *found), rows['v'], rtol=1e-6
  )


def test_a_new_token_joins_what_the_cache_gave():
  packing = Packing(4)
  (k, v), plain = packed_cache(2, 2, 70, 64, 'float32', packing)
  q = draw((2, 2, 1, 64), 'float32') * 0.1
  rows = {'k': draw(q.shape, 'float32', 4), 'v': draw(q.shape, 'float32', 5)}
  start, position = jnp.array([0, 9]), 60
  column = jnp.arange(70)
  seen = (column < position) & (column >= start[:, None])
  bias = jnp.where(seen[:, None], 0.0, kernels.MASKED)
  bias = jnp.broadcast_to(bias, (2, 2, 70))
  found = kernels.attend(
    q[:, :, 0], k, v, bias, packing, 'float32', interpret=INTERPRET
  )
  cache = dict(zip('kv', plain, strict=True))
  expected = attention.attend(q, rows, cache, start, jnp.int32(position))
  np.testing.assert_allclose(
    attention.join(q, rows, *found), expected, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  ('bits', 'size', 'fits'),
  [(4, 64, True), (4, 128, True), (4, 80, False), (8, 64, False)],
)
def test_other_formats_are_left_to_plain_jax(bits, size, fits):
  assert kernels.fits(Packing(bits), size) == fits
  assert not kernels.fits(Packing(), size)
