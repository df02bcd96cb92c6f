"""Logits -> next tokens, each row by its own parameters and random stream.

A row's token depends on its logits, its parameters, its seed and its step
alone, never on the rest of the batch: noise is drawn per row, and the three
modes agree wherever a row does not use what the cheaper one leaves out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexjax.config import SamplingParams

_NEVER = -jnp.inf


class Sampling(NamedTuple):
  """Parameters of B rows, see `config.SamplingParams`; NumPy or JAX."""

  temperature: Any  # [B] float32
  top_k: Any  # [B] int32
  top_p: Any  # [B] float32
  seed: Any  # [B] uint32


def pack(
  params: Sequence[SamplingParams | None], index: np.ndarray
) -> Sampling:
  """Packs the parameters of the rows; None for a row without a request."""
  rows = [p or SamplingParams() for p in params]
  seeds = [
    int(n) if p.seed is None else p.seed
    for p, n in zip(rows, np.maximum(index, 0), strict=True)
  ]
  return Sampling(
    np.array([p.temperature for p in rows], np.float32),
    np.array([min(p.top_k, 2**31 - 1) for p in rows], np.int32),
    np.array([p.top_p for p in rows], np.float32),
    np.array([s % 2**32 for s in seeds], np.uint32),
  )


def mode(params: Sequence[SamplingParams | None]) -> str:
  """The cheapest mode that serves all rows: greedy, sample or filter."""
  drawn = [p for p in params if p is not None and p.temperature > 0]
  if not drawn:
    return 'greedy'
  return 'filter' if any(p.top_k or p.top_p < 1 for p in drawn) else 'sample'


def pick(logits: Array, sampling: Sampling, step: Array, mode: str) -> Array:
  """Returns the next tokens [B] int32 for logits [B, V].

  Temperature first, then top-k, then top-p over what is left; the draw adds
  Gumbel noise and takes the maximum.
  """
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if mode == 'greedy':
    return best
  hot = sampling.temperature > 0
  x = logits / jnp.where(hot, sampling.temperature, 1.0)[:, None]
  if mode == 'filter':
    x = _filter(x, sampling)

  def noise(seed):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

  drawn = jnp.argmax(x + jax.vmap(noise)(sampling.seed), axis=-1)
  return jnp.where(hot, drawn.astype(jnp.int32), best)


def _filter(x: Array, sampling: Sampling) -> Array:
  """Puts out of reach what top-k and top-p leave out."""
  size = x.shape[-1]
  ranked = -jnp.sort(-x, axis=-1)  # [B, V], best first
  count = jnp.where(sampling.top_k > 0, sampling.top_k, size)
  kept = jnp.arange(size) < count[:, None]
  p = jax.nn.softmax(jnp.where(kept, ranked, _NEVER), axis=-1)
  # A token is kept while what lies before it has not reached top_p.
  before = jnp.cumsum(p, axis=-1) - p
  all_of_it = (sampling.top_p >= 1)[:, None]
  kept &= all_of_it | (before < sampling.top_p[:, None])
  last = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(x >= last, x, _NEVER)
