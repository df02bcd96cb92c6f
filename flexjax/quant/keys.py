"""What a head's keys have in common at every position, kept out of the codes.

With learned positions much of a key depends on its position alone: a smooth
wave, which would set the range of every group and leave few codes for the
rest. A head's wave is a sum of a few cosines over the table of positions,

    wave(t) = sum_r coefficients[r] cos(pi r (t + 1/2) / positions)

taken off a key before it is packed. Scores get it back: queries times
coefficients times cosines, an R/H th of the score's own work.
"""

import jax.numpy as jnp
from jax import Array

from flexjax.quant.groupwise import exact_product

TERMS = 8  # R; the bundled model's keys lose a tenth as much as without


def fit(keys: Array) -> Array:
  """Keys [N, P, H] at all positions -> coefficients [N, H, R]."""
  positions = keys.shape[1]
  z = cosines(jnp.arange(positions), positions)
  norm = jnp.where(jnp.arange(TERMS) == 0, 1, 2) / positions
  return exact_product('nph,pr->nhr', keys, z) * norm


def cosines(t: Array, positions: int) -> Array:
  """Positions [...] -> cosines [..., R]."""
  angle = jnp.pi * (t.astype(jnp.float32) + 0.5) / positions
  return jnp.cos(angle[..., None] * jnp.arange(TERMS))


def lower(keys: Array, coefficients: Array, z: Array) -> Array:
  """Takes the waves off keys [B, N, T, H]; z is [B, T, R]."""
  waves = exact_product('nhr,btr->bnth', coefficients, z)
  return (keys.astype(jnp.float32) - waves).astype(keys.dtype)


def by_term(queries: Array, coefficients: Array) -> Array:
  """Queries [B, N, T, H] -> [B, N, T, R]; times the cosines of the lowered
  keys' positions, it is what their scores lack."""
  return exact_product('bnth,nhr->bntr', queries, coefficients)
