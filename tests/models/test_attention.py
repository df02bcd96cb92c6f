"""Attention by itself: to caches of other numbers than queries have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models import attention

B, N, S, H = 3, 7, 24, 8


def drawn(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('kept', ['float32', 'of queries'])
@pytest.mark.parametrize('columns', [1, 2])
def test_halves_are_attended_to_as_float32_is(dtype, kept, columns):
  shapes = {'q': columns, 'k': columns, 'v': columns, 'old_k': S, 'old_v': S}
  x = {
    name: drawn(n, B, N, rows, H).astype(dtype)
    for n, (name, rows) in enumerate(shapes.items())
  }
  rows, cache = ({i: x[name + i] for i in 'kv'} for name in ('', 'old_'))
  start, position = jnp.asarray([0, 5, 19]), jnp.int32(20)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (x['q'], rows, cache))
  expected = attention.attend(*wide, start, position)
  if kept == 'float32':
    cache = wide[2]

  def attended(cache):
    return attention.attend(x['q'], rows, cache, start, position)

  found = attended(cache)
  assert found.dtype == dtype
  assert found.shape == expected.shape
  np.testing.assert_allclose(
    np.asarray(found, np.float32),
    np.asarray(expected),
    rtol=2.0 ** {'bfloat16': -6, 'float16': -9}[dtype],
    atol=2.0 ** {'bfloat16': -7, 'float16': -10}[dtype],
  )
  # Columns of padding, and those not yet written, are none.
  for column in (0, 4, 20, 23):
    changed = {name: x.at[1, :, column].set(100) for name, x in cache.items()}
    again = attended(changed)
    np.testing.assert_array_equal(np.asarray(again[1]), np.asarray(found[1]))
