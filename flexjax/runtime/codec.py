"""What the layer functions see of packed tensors: nothing.

Where quant and models meet: matrices and cache are expanded before a layer
function takes them, new cache rows are packed as it hands them out.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from flexjax.config import ModelConfig, Packing
from flexjax.models import opt
from flexjax.quant import groupwise

# New rows are packed at every step, so their ranges are refined, not searched.
_ROWS = groupwise.Rounding((1.0,), 2)


def is_packed(x: Array) -> bool:
  return x.dtype == jnp.uint8


class Codec:
  """Expands and packs, for the inside of a jit.

  Args:
    dtype: what layer functions take.
    weights, cache: how matrices, and keys and values, are stored.
  """

  def __init__(
    self, config: ModelConfig, dtype: str, weights: Packing, cache: Packing
  ):
    self.dtype = jnp.dtype(dtype)
    self.packing, self.cache = weights, cache
    self._head_size = config.head_size
    self._columns = {
      name: shape[-1]
      for group in opt.weight_groups(config)
      for name, shape in group.items()
      if name in opt.MATRICES
    }

  def expand_weights(self, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Expands the matrices that are packed; the rest is left as it is."""

    def one(name: str, w: Array) -> Array:
      if not is_packed(w):
        return w
      w = groupwise.expand(w, self.packing, self._columns[name], self.dtype)
      # The same numbers, bit for bit, whatever the product fuses with.
      return jax.lax.optimization_barrier(w)

    return {name: one(name, w) for name, w in weights.items()}

  def expand_cache(self, cache: opt.Cache | None) -> opt.Cache | None:
    """Expands keys and values [B, N, S, row_bytes] -> [B, N, S, H]."""
    if cache is None or not self.cache.packs:
      return cache
    return {
      name: groupwise.expand(x, self.cache, self._head_size, self.dtype)
      for name, x in cache.items()
    }

  def pack_rows(self, rows: opt.Cache | None) -> opt.Cache | None:
    """Packs new keys and values [B, N, T, H] -> [B, N, T, row_bytes]."""
    if rows is None or not self.cache.packs:
      return rows
    return {
      name: groupwise.pack(x, self.cache, _ROWS) for name, x in rows.items()
    }
