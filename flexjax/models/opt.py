"""OPT in Flax Linen: Embed, Attention, MLP, Head, all of one signature.

A layer maps (weights, hidden, cache, start, position) to (hidden, new cache
rows). It knows no tier and no schedule: weights and cache are handed in, new
rows are handed out, and whoever calls decides where either lives.

Weights are few large arrays in the checkpoint's own [out, in] orientation, so
that converting never transposes; vectors of a layer are packed into one.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexjax.config import TILE_BYTES, ModelConfig
from flexjax.typing import Shapes

POSITION_OFFSET = 2  # OPT's position table starts at row 2
ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_new': jax.nn.gelu,
  'gelu_pytorch_tanh': jax.nn.gelu,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
}
MATRICES = ('qkv', 'out', 'fc1', 'fc2')
"""The layers' matrices: what may be packed, unlike tables and vectors."""
QUERY_CHUNK = 256  # positions; scores beyond it are never held at once
_SCORE_BYTES = 64 * 2**20  # float32 scores held at once in a prefill
_FUSED_SIZES = range(8, 129, 8)  # of heads, that cuDNN attends with
BITS = jnp.dtype('uint16')  # see `as_bits`
_MASKED = -1e30  # finite: a row that is all padding must not become NaN


Cache = Mapping[str, Array]
"""Keys 'k' and values 'v', each [B, N, S, H]."""


class Layer(NamedTuple):
  """One layer of the schedule.

  Attributes:
    kind: 'embed', 'attention', 'mlp' or 'head'.
    module: what it computes.
    groups: which weight groups it reads (see `weight_groups`).
  """

  kind: str
  module: nn.Module
  groups: tuple[int, ...]


def layers(
  config: ModelConfig, dtype: DTypeLike, *, fused: bool = False
) -> tuple[Layer, ...]:
  """Returns the J = 2 * num_layers + 2 layers, embed first, head last.

  Args:
    fused: prefills may attend by cuDNN, see `attend`.
  """
  dtype = jnp.dtype(dtype)
  blocks: dict[str, Callable[..., nn.Module]] = {
    'attention': functools.partial(Attention, fused=fused),
    'mlp': MLP,
  }
  last = 2 * config.num_layers + 2
  body = [
    Layer(kind, module(config, dtype), (2 + 2 * n + m,))
    for n in range(config.num_layers)
    for m, (kind, module) in enumerate(blocks.items())
  ]
  head_groups: tuple[int, ...] = (0,) if config.tied_head else ()
  if weight_groups(config)[last]:  # without norm there may be nothing
    head_groups += (last,)
  return (
    Layer('embed', Embed(config, dtype), (0, 1)),
    *body,
    Layer('head', Head(config, dtype), head_groups),
  )


def weight_groups(config: ModelConfig) -> tuple[Shapes, ...]:
  """Returns tensor shapes of every weight group: the unit of placement.

  Group 0 is the token table, a group of its own because a tied head reads it
  too; then the rest of the embedding, attention and MLP in turn, the head.
  """
  d, f, e = config.hidden_size, config.ffn_size, config.embed_size
  attention: Shapes = {'qkv': (3 * d, d), 'out': (d, d)}
  mlp: Shapes = {'fc1': (f, d), 'fc2': (d, f)}
  embed = {'positions': (config.max_positions + POSITION_OFFSET, d)}
  head: dict[str, tuple[int, ...]] = {}
  if e != d:
    embed['project_in'] = (d, e)
    head['project_out'] = (e, d)
  if not config.tied_head:
    head['table'] = (config.vocab_size, e)
  blocks = [
    _packed(attention, config, 'attention'),
    _packed(mlp, config, 'mlp'),
  ]
  return (
    {'table': (config.vocab_size, e)},
    embed,
    *blocks * config.num_layers,
    _packed(head, config, 'head'),
  )


def _packed(shapes: Shapes, config: ModelConfig, kind: str) -> Shapes:
  size = sum(vector_sizes(config, kind).values())
  return {**shapes, 'vectors': (size,)} if size else shapes


def vector_sizes(config: ModelConfig, kind: str) -> dict[str, int]:
  """Returns the vectors packed into a layer's `vectors`, in their order."""
  d = config.hidden_size
  norm = {'scale': d, 'offset': d} if config.norm_affine else {}
  if kind == 'head':
    return norm if config.final_layer_norm else {}
  if kind == 'attention':
    return norm | ({'qkv': 3 * d, 'out': d} if config.bias else {})
  if kind == 'mlp':
    return norm | ({'fc1': config.ffn_size, 'fc2': d} if config.bias else {})
  return {}


class _Base(nn.Module):
  """What the four layers share: their parameters and a linear map."""

  config: ModelConfig
  dtype: jnp.dtype

  def weight(self, name: str, *shape: int) -> Array:
    return self.param(name, nn.initializers.normal(0.02), shape, self.dtype)

  def dense(self, name: str, x: Array, out: int, bias: Array | None = None):
    """x [..., in] times the transposed matrix `name` [out, in].

    It is sown into the collection 'inputs', for those who want to know what
    matrices are multiplied by.
    """
    self.sow('inputs', name, x, reduce_fn=lambda _, new: new)
    return linear(x, self.weight(name, out, x.shape[-1]), bias)

  def vectors(self, kind: str) -> Mapping[str, Array]:
    """Unpacks the layer's biases, norm scale and norm offset, in float32."""
    sizes = vector_sizes(self.config, kind)
    if not sizes:
      return {}

    def init(key, shape, dtype):
      del key, shape
      fill = {'scale': jnp.ones}
      return jnp.concatenate(
        [fill.get(n, jnp.zeros)(s, dtype) for n, s in sizes.items()]
      )

    packed = self.param('vectors', init, (sum(sizes.values()),), self.dtype)
    out, begin = {}, 0
    for name, size in sizes.items():
      out[name] = packed[begin : begin + size].astype(jnp.float32)
      begin += size
    return out

  def norm(self, x: Array, v: Mapping[str, Array]) -> Array:
    """Layer norm over D in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5)
    if 'scale' in v:
      x = x * v['scale'] + v['offset']
    return x.astype(self.dtype)


class Embed(_Base):
  """Token ids [B, T] -> hidden [B, T, D]."""

  @nn.compact
  def __call__(self, hidden, cache, start, position):
    del cache
    c = self.config
    table = self.weight('table', c.vocab_size, c.embed_size)
    positions = self.weight(
      'positions', c.max_positions + POSITION_OFFSET, c.hidden_size
    )
    x = table[hidden]  # [B, T, E]
    if c.embed_size != c.hidden_size:
      x = linear(x, self.weight('project_in', c.hidden_size, c.embed_size))
    column = position + jnp.arange(hidden.shape[1])
    row = jnp.maximum(column - start[:, None], 0)  # [B, T]
    return x + positions[row + POSITION_OFFSET], None


class Attention(_Base):
  """Self-attention with its norm and residual; returns new cache rows.

  Cache and rows are {'k': keys, 'v': values}, each [B, N, S or T, H]: rows of
  a head lie together, which batched products read without a transpose, and
  keys apart from values, which XLA:CPU would copy out of a joint array.

  Attributes:
    fused: see `attend`.
  """

  fused: bool = False

  @nn.compact
  def __call__(self, hidden, cache, start, position):
    q, rows = self.project(hidden)
    x = attend(q, rows, cache, start, position, fused=self.fused)
    return self.output(hidden, x), rows

  @nn.compact
  def project(self, hidden):
    """hidden [B, T, D] -> queries [B, N, T, H], new rows of the cache."""
    b, t, d = hidden.shape
    v = self.vectors('attention')
    x = self.norm(hidden, v) if self.config.pre_layer_norm else hidden
    x = self.dense('qkv', x, 3 * d, v.get('qkv'))
    x = x.reshape(b, t, 3, self.config.num_heads, self.config.head_size)
    x = x.transpose(2, 0, 3, 1, 4)  # [3, B, N, T, H]
    return x[0] * (self.config.head_size**-0.5), {'k': x[1], 'v': x[2]}

  @nn.compact
  def output(self, hidden, x):
    """Attended values [B, N, T, H] -> hidden [B, T, D], residual added."""
    b, t, d = hidden.shape
    v = self.vectors('attention')
    x = x.transpose(0, 2, 1, 3).reshape(b, t, d)
    x = hidden + self.dense('out', x, d, v.get('out'))
    return x if self.config.pre_layer_norm else self.norm(x, v)


class MLP(_Base):
  """Feed-forward network with its norm and residual."""

  @nn.compact
  def __call__(self, hidden, cache, start, position):
    del cache, start, position
    c = self.config
    v = self.vectors('mlp')
    x = self.norm(hidden, v) if c.pre_layer_norm else hidden
    x = self.dense('fc1', x, c.ffn_size, v.get('fc1'))
    x = ACTIVATIONS[c.activation](x)
    x = hidden + self.dense('fc2', x, c.hidden_size, v.get('fc2'))
    return x if c.pre_layer_norm else self.norm(x, v), None


class Head(_Base):
  """hidden [B, T, D] -> float32 logits [B, V] of the last position."""

  @nn.compact
  def __call__(self, hidden, cache, start, position):
    del cache, start, position
    return self.logits(hidden[:, -1:])[:, 0], None

  @nn.compact
  def logits(self, hidden):
    """hidden [B, T, D] -> float32 logits [B, T, V]."""
    c = self.config
    v = self.vectors('head')
    x = self.norm(hidden, v) if c.final_layer_norm else hidden
    if c.embed_size != c.hidden_size:
      x = linear(x, self.weight('project_out', c.embed_size, c.hidden_size))
    table = self.weight('table', c.vocab_size, c.embed_size)
    return linear(x, table, dtype=jnp.float32)


def linear(x: Array, w: Array, bias: Array | None = None, dtype=None) -> Array:
  """x [..., in], w [out, in] -> [..., out]; accumulates in float32."""
  rows = x.reshape(-1, x.shape[-1])
  n = rows.shape[0]
  if n < 4 and w.dtype.itemsize < 4:
    # XLA:CPU: one 16-bit row takes ten times as long as four.
    rows = jnp.pad(rows, ((0, 4 - n), (0, 0)))
  y = jax.lax.dot_general(
    rows, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )[:n]
  if bias is not None:
    y = y + bias
  return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], w.shape[0])


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
      tokens, in `q`'s dtype or float32, or `as_bits` of `q`'s; None where there
      are none yet.
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
  if cache is not None and cache['k'].dtype == BITS:
    assert lift is None, 'only packed keys lack anything'
    return _attend_bits(q, rows, cache, start, position)
  if cache is not None:
    return _attend_cached(q, rows, cache, start, position, lift)
  _, n, t, h = q.shape
  if fused and stored is None and q.dtype.itemsize == 2 and h in _FUSED_SIZES:
    return _attend_fused(q, rows, start)
  chunk_bytes = 4 * n * min(t, QUERY_CHUNK) * t
  return jax.lax.map(
    lambda row: _attend_fresh(*row),
    (q, rows, stored, lift, start),
    batch_size=max(1, min(q.shape[0], _SCORE_BYTES // chunk_bytes)),
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


def as_bits(x: Array) -> Array:
  """16-bit numbers as integers of the same bits, for a CPU to keep.

  XLA:CPU copies all of an array of 16-bit numbers into float32 and back to
  write, or to read, a part of it, and does neither to integers.
  """
  return jax.lax.bitcast_convert_type(x, BITS)


def of_bits(x: Array, dtype: DTypeLike) -> Array:
  """Returns what `as_bits` was given."""
  return jax.lax.bitcast_convert_type(x, dtype)


def _attend_bits(q, rows, bits, start, position):
  """Some heads at a time, whose keys and values become float32 in the CPU's
  caches: less is read from memory than if they were that there."""
  b, n, s, h = bits['k'].shape
  heads = tile_heads(b * n, s * h)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q, rows))

  def split(x: Array) -> Array:
    return x.reshape(b * n // heads, heads, 1, *x.shape[2:])

  def one(tile):
    (q, rows), bits, start = tile
    cache = {k: of_bits(x, dtype).astype(jnp.float32) for k, x in bits.items()}
    return _attend_cached(q, rows, cache, start, position, None)

  dtype = q.dtype
  starts = jnp.repeat(start, n).reshape(-1, heads)
  x = jax.lax.map(one, (*jax.tree.map(split, (wide, dict(bits))), starts))
  return x.reshape(q.shape).astype(dtype)


def tile_heads(heads: int, numbers: int) -> int:
  """How many of all heads a CPU attends with at once, as float32: a divisor.

  Args:
    numbers: of one head's keys, S * H.
  """
  most = max(1, TILE_BYTES // (4 * numbers))
  return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)


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
