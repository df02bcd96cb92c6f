"""Where quant and models meet, so that neither knows the other.

Matrices and cache are expanded before a layer takes them, new cache rows are
packed as it hands them out; what packed keys lack, its scores are given back.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from flexjax.config import ModelConfig, Packing
from flexjax.models import attention, opt
from flexjax.quant import groupwise, kernels, keys

# New rows are packed at every step, so their ranges are refined, not searched.
ROWS = {
  'minmax': groupwise.MINMAX,
  'search': groupwise.Rounding((1.0,), 2),
}


def is_packed(x: Array) -> bool:
  return x.dtype == jnp.uint8


class Codec:
  """Expands and packs, for the inside of a jit.

  Args:
    dtype: what layer functions take.
    weights, cache: how matrices, and keys and values, are stored.
    rounding: of new rows of the cache, a key of `ROWS`.
    attended: dtype in which a packed cache is expanded; `dtype` unless given.
    fused: the device runs `quant.kernels`.
  """

  def __init__(
    self,
    config: ModelConfig,
    dtype: str,
    weights: Packing,
    cache: Packing,
    rounding: str = 'search',
    attended: str | None = None,
    fused: bool = False,
  ):
    self.dtype = jnp.dtype(dtype)
    self.packing, self.cache = weights, cache
    self.attended = jnp.dtype(attended or dtype)
    self._rounding = ROWS[rounding]
    self._head_size = config.head_size
    self.fused = fused and kernels.fits(cache, config.head_size)
    self._positions = config.max_positions
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

  def expand_cache(self, cache: attention.Cache) -> dict[str, Array]:
    """Expands keys and values [B, N, S, row_bytes] -> [B, N, S, H]."""
    return {
      name: groupwise.expand(
        x, self.cache, self._head_size, self.attended, of=self.dtype
      )
      for name, x in cache.items()
    }

  def pack_rows(
    self, rows: attention.Cache, waves: Array, start: Array, position: Array
  ) -> dict[str, Array]:
    """Packs new keys and values [B, N, T, H] -> [B, N, T, row_bytes].

    Args:
      waves: [N, H, R], see `quant.keys`; `lift` gives back what they take.
    """
    z = self._cosines(rows['k'].shape[2], start, position)
    lowered = {**rows, 'k': keys.lower(rows['k'], waves, z)}
    pack = kernels.pack if self.fused else groupwise.pack
    return {
      name: pack(x, self.cache, self._rounding) for name, x in lowered.items()
    }

  def attend(
    self,
    q: Array,
    cache: attention.Cache,
    waves: Array,
    start: Array,
    position: Array,
  ) -> kernels.Attended:
    """What the query of one new token [B, N, 1, H] finds in a packed cache,
    by a kernel that reads it as it is."""
    columns = cache['k'].shape[2]
    terms, cosines = self.lift(q, waves, start, columns)
    lack = groupwise.exact_product('bnr,bsr->bns', terms[:, :, 0], cosines)
    column = jnp.arange(columns)
    seen = (column < position) & (column >= start[:, None])  # [B, S]
    return kernels.attend(
      q[:, :, 0].astype(jnp.float32),
      cache['k'],
      cache['v'],
      jnp.where(seen[:, None], lack, kernels.MASKED),
      self.cache,
      self.dtype,
    )

  def lift(
    self, q: Array, waves: Array, start: Array, columns: int
  ) -> tuple[Array, Array]:
    """What the scores of queries [B, N, T, H] with `columns` packed keys lack:
    [B, N, T, R] and [B, columns, R], to be multiplied."""
    return keys.by_term(q, waves), self._cosines(columns, start, 0)

  def _cosines(self, columns: int, start: Array, position: Array | int):
    t = position + jnp.arange(columns) - start[:, None]  # [B, columns]
    return keys.cosines(t, self._positions)
