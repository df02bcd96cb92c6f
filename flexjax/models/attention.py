"""Attention of new tokens to themselves and to a cache, however that is kept.

Functions of queries, keys and values alone: of several, the one that suits the
machine, the phase and the cache's numbers is taken.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from flexjax.config import QUERY_CHUNK, SCORE_BYTES

_FUSED_SIZES = range(8, 129, 8)  # of heads, that cuDNN attends with
_MASKED = -1e30  # finite: a row that is all padding must not become NaN

Cache = Mapping[str, Array]
"""Keys 'k' and values 'v', each [B, N, S, H]."""


def attend(
  q: Array,
  rows: Cache,
  cache: Cache | None,
  start: Array,
  position: Array,
  stored: Cache | None = None,
  lift: tuple[Array, Array] | None = None,
  *,
  fused: bool = False,
) -> Array:
  """Causal attention of T new tokens over the cache and over themselves.

  Args:
    q: queries [B, N, T, H], already scaled.
    rows: keys and values of the new tokens, each [B, N, T, H].
    cache: keys and values, each [B, N, S, H], of which `position` rows hold
      tokens, in `q`'s dtype or float32; None where there are none yet.
    start: [B] columns of left padding in each row of the batch.
    position: column of the first new token.
    stored: the new rows as later tokens will read them, where a cache is not
      exact: every token then sees what it would if tokens came one at a time.
      Only without a cache.
    lift: float32 [B, N, T, R] and [B, S or T, R], whose product is added to the
      scores of the cache, or of `stored`: what its keys lack.
    fused: on a GPU that cuDNN's attention knows; it takes 16 bits, and no
      scores but its own.

  Returns:
    Attended values [B, N, T, H] in `q`'s dtype; softmax is in float32.
  """
  if cache is not None:
    return _attend_cached(q, rows, cache, start, position, lift)
  _, n, t, h = q.shape
  if fused and stored is None and q.dtype.itemsize == 2 and h in _FUSED_SIZES:
    return _attend_fused(q, rows, start)
  chunk_bytes = 4 * n * min(t, QUERY_CHUNK) * t
  return jax.lax.map(
    lambda row: _attend_fresh(*row),
    (q, rows, stored, lift, start),
    batch_size=max(1, min(q.shape[0], SCORE_BYTES // chunk_bytes)),
  )


def _attend_fresh(q, rows, stored, lift, start):
  """One prompt: q and rows [N, T, H]; queries in chunks, keys up to each."""
  t = q.shape[1]
  seen = stored or rows
  out = []
  for begin in range(0, t, QUERY_CHUNK):
    end = min(begin + QUERY_CHUNK, t)
    now = slice(begin, end)
    s = _product('nth,nsh->nts', q[:, now], seen['k'][:, :end])
    column = jnp.arange(end)
    itself = column == jnp.arange(begin, end)[:, None]
    if lift:
      s = s + _lifted('ntr,sr->nts', lift[0][:, now], lift[1][:end])
    if stored:  # a token reads its own key and value as they are
      own = _product('nth,nth->nt', q[:, now], rows['k'][:, now])
      s = jnp.where(itself, own[..., None], s)
    causal = (column <= jnp.arange(begin, end)[:, None]) & (column >= start)
    p = jax.nn.softmax(jnp.where(causal, s, _MASKED), axis=-1)
    x = _product('nts,nsh->nth', p.astype(q.dtype), seen['v'][:, :end])
    if stored:
      own = jnp.where(itself, p, 0).sum(-1)[..., None]
      exact, held = (a['v'][:, now].astype(jnp.float32) for a in (rows, seen))
      x = x + own * (exact - held)
    out.append(x)
  return jnp.concatenate(out, axis=1).astype(q.dtype)


def _attend_fused(q, rows, start):
  """Prompts by cuDNN, which takes [B, T, N, H] and never writes scores."""
  q, k, v = (x.swapaxes(1, 2) for x in (q, rows['k'], rows['v']))
  t = q.shape[1]
  seen = jnp.arange(t) >= start[:, None]  # [B, T]
  x = jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=jnp.broadcast_to(seen[:, None, None], (len(start), 1, t, t)),
    scale=1.0,
    is_causal=True,
    implementation='cudnn',
  )
  return x.swapaxes(1, 2)


def join(
  q: Array, rows: Cache, values: Array, weight: Array, top: Array
) -> Array:
  """Completes one token's attention to a cache by that to itself.

  Args:
    q, rows: as of `attend`, of one new token.
    values: float32 [B, N, H], the cache's weighted by exp(score - top).
    weight, top: float32 [B, N], the sum of the weights; the highest score.

  Returns:
    Attended values [B, N, 1, H] in `q`'s dtype.
  """
  k, v = (rows[name][:, :, 0].astype(jnp.float32) for name in 'kv')
  own = (q[:, :, 0].astype(jnp.float32) * k).sum(-1)
  highest = jnp.maximum(top, own)
  old, new = jnp.exp(top - highest), jnp.exp(own - highest)
  x = values * old[..., None] + v * new[..., None]
  x = x / (weight * old + new)[..., None]
  return x[:, :, None].astype(q.dtype)


def _attend_cached(q, rows, cache, start, position, lift):
  """Two softmaxes in one: over the cache's rows and over the new ones."""
  t = q.shape[2]
  queries, stored = q, cache['k'].dtype
  if t == 1 and stored.itemsize < 4:
    # On an H200 the cache is read at 2.6 TB/s instead of 1.7.
    queries = jnp.concatenate([q, q], axis=2)
  old = _product('bnth,bnsh->bnts', queries, cache['k'])
  if lift:
    old = old + _lifted('bntr,bsr->bnts', *lift)
  new = _product('bnth,bnsh->bnts', queries, rows['k'])
  column = jnp.arange(cache['k'].shape[2])
  seen = (column < position) & (column >= start[:, None])  # [B, S]
  old = jnp.where(seen[:, None, None], old, _MASKED)
  column = jnp.arange(t)
  seen = column <= jnp.arange(queries.shape[2])[:, None]
  seen = seen & (position + column >= start[:, None])[:, None]  # [B, T, T]
  new = jnp.where(seen[:, None], new, _MASKED)
  top = jnp.maximum(old.max(-1), new.max(-1))[..., None]
  old, new = jnp.exp(old - top), jnp.exp(new - top)
  total = (old.sum(-1) + new.sum(-1))[..., None]
  x = _product('bnts,bnsh->bnth', old.astype(stored), cache['v'])
  x = x + _product('bnts,bnsh->bnth', new.astype(q.dtype), rows['v'])
  return (x / total)[:, :, :t].astype(q.dtype)


def _lifted(spec: str, a: Array, b: Array) -> Array:
  """In full precision, as what it gives back was taken off."""
  return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def _product(spec: str, a: Array, b: Array) -> Array:
  """In the wider type of the two, summed in float32."""
  wider = jnp.promote_types(a.dtype, b.dtype)
  return jnp.einsum(
    spec,
    a.astype(wider),
    b.astype(wider),
    preferred_element_type=jnp.float32,
  )
