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

from flexjax.config import ModelConfig
from flexjax.models.attention import attend
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
