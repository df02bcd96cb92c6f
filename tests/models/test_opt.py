"""Attention by itself: what a CPU keeps in 16 bits, against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models import opt

B, N, S, H = 3, 7, 24, 8


def drawn(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_bits_are_the_numbers(dtype):
  x = jnp.asarray([0.0, -0.0, 1.5, -3e-5, 6e4, jnp.inf, -jnp.inf], dtype)
  bits = opt.as_bits(x)
  assert bits.dtype == opt.BITS
  assert bits.nbytes == x.nbytes
  back = opt.of_bits(bits, x.dtype)
  np.testing.assert_array_equal(np.asarray(back), np.asarray(x))
  assert np.signbit(np.asarray(back, np.float32)[1])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('tile', [1, 4 * S * H, 7 * 4 * S * H, 2**30])
@pytest.mark.parametrize('columns', [1, 2])
def test_bits_are_attended_to_as_float32_is(monkeypatch, dtype, tile, columns):
  monkeypatch.setattr(opt, 'TILE_BYTES', tile)
  shapes = {'q': columns, 'k': columns, 'v': columns, 'old_k': S, 'old_v': S}
  x = {
    name: drawn(n, B, N, rows, H).astype(dtype)
    for n, (name, rows) in enumerate(shapes.items())
  }
  rows, cache = ({i: x[name + i] for i in 'kv'} for name in ('', 'old_'))
  start, position = jnp.asarray([0, 5, 19]), jnp.int32(20)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (x['q'], rows, cache))
  expected = opt.attend(*wide, start, position)

  def attended(cache):
    bits = {name: opt.as_bits(x) for name, x in cache.items()}
    return opt.attend(x['q'], rows, bits, start, position)

  found = attended(cache)
  assert found.dtype == dtype
  assert found.shape == expected.shape
  np.testing.assert_allclose(
    np.asarray(found, np.float32),
    np.asarray(expected),
    rtol=2.0 ** {'bfloat16': -8, 'float16': -10}[dtype],
    atol=1e-6,
  )
  # Columns of padding, and those not yet written, are none.
  for column in (0, 4, 20, 23):
    changed = {name: x.at[1, :, column].set(100) for name, x in cache.items()}
    again = attended(changed)
    np.testing.assert_array_equal(np.asarray(again[1]), np.asarray(found[1]))


@pytest.mark.parametrize(
  ('heads', 'numbers', 'expected'),
  [
    (448, 2**16, 16),
    (56, 2**16, 14),
    (12, 2**30, 1),
    (13, 2**16, 13),
    (13, 2**17, 1),
  ],
)
def test_heads_of_a_tile_divide_all(monkeypatch, heads, numbers, expected):
  monkeypatch.setattr(opt, 'TILE_BYTES', 2**22)
  assert opt.tile_heads(heads, numbers) == expected
