"""The only place where anything is jitted for the engine.

One function per layer kind, whatever the number of layers, steps and blocks.
Every trace is counted: a recompilation per token would show in the stats.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flexjax.models import attention, opt
from flexjax.policy import volume
from flexjax.runtime import sampling
from flexjax.runtime.codec import Codec

CACHE_AXIS = 2  # rows S of keys and values [B, N, S, H]


class Compute:
  """The jitted layer functions of one model.

  Args:
    codec: how packed weights and cache are expanded.
    chunk_tokens: a prefill goes through a layer in chunks of rows with at
      most so many tokens, which bounds its temporaries.

  Attributes:
    traces: how many functions have been traced, hence compiled.
    trace_seconds: time spent in calls that had to compile.
  """

  def __init__(
    self, layers: Sequence[opt.Layer], codec: Codec, chunk_tokens: int
  ):
    self.traces = 0
    self.trace_seconds = 0.0
    modules = {layer.kind: layer.module for layer in layers}
    attends = modules['attention']
    self._layers = {
      kind: self._jit(
        functools.partial(_apply, module, codec, chunk_tokens), ('reread',)
      )
      for kind, module in modules.items()
      if kind != 'head'
    }
    self._in_place = self._jit(
      functools.partial(_apply_in_place, attends, codec), donate=(2,)
    )
    self.expand = self._jit(codec.expand_weights)
    self.project = self._jit(functools.partial(_project, attends, codec))
    self.attend = self._jit(attention.attend)
    self.output = self._jit(functools.partial(_output, attends, codec))
    head = modules['head']
    self.pick = self._jit(functools.partial(_pick, head), ('mode',))
    self.score = self._jit(functools.partial(_score, head), ('top',))
    self.take = self._jit(jnp.take, ('axis',))

  def layer(
    self,
    kind: str,
    weights: dict[str, Array],
    hidden: Array,
    cache: attention.Cache | None,
    start: Array,
    position: Array,
    waves: Array | None = None,
    reread: bool = False,
  ) -> tuple[Array, dict[str, Array] | None]:
    """Runs an embed, attention or mlp layer: (hidden, new cache rows).

    Packed weights may be expanded before, by `expand`, or are in here.

    Args:
      waves: of the layer's keys, where the cache is packed; see `quant.keys`.
      reread: a prefill's tokens see each other as the packed cache holds them.
    """
    reread = reread and waves is not None
    return self._layers[kind](
      weights, hidden, cache, start, position, waves, reread=reread
    )

  def attend_in_place(
    self,
    weights: dict[str, Array],
    hidden: Array,
    cache: attention.Cache,
    start: Array,
    position: Array,
    waves: Array | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    """Runs an attention layer of a decode step: (hidden, the cache with the
    new rows in it). The cache is donated: one call instead of two."""
    return self._in_place(weights, hidden, cache, start, position, waves)

  def _jit(
    self,
    function: Callable,
    static: tuple[str, ...] = (),
    donate: tuple[int, ...] = (),
  ) -> Any:
    def counted(*args, **kwargs):
      self.traces += 1
      return function(*args, **kwargs)

    jitted = jax.jit(counted, static_argnames=static, donate_argnums=donate)

    def call(*args, **kwargs):
      traces, began = self.traces, time.perf_counter()
      out = jitted(*args, **kwargs)
      if self.traces > traces:
        self.trace_seconds += time.perf_counter() - began
      return out

    return call


def _apply(
  module,
  codec,
  chunk_tokens,
  weights,
  hidden,
  cache,
  start,
  position,
  waves,
  reread,
):
  def layer(hidden, start):
    # Within the loop over chunks: never more than a layer's needs at a time.
    params = {'params': codec.expand_weights(weights)}
    if waves is None:
      return module.apply(params, hidden, cache, start, position)
    q, rows = module.apply(params, hidden, method='project')
    packed = codec.pack_rows(rows, waves, start, position)
    if cache is not None:
      x = _attend(codec, q, rows, cache, start, position, waves)
    else:
      stored = lift = None
      if reread:
        stored = codec.expand_cache(packed)
        lift = codec.lift(q, waves, start, hidden.shape[1])
      x = attention.attend(
        q, rows, None, start, position, stored, lift, fused=module.fused
      )
    return module.apply(params, hidden, x, method='output'), packed

  batch, columns = hidden.shape[:2]
  rows = volume.chunk_rows(batch, columns, chunk_tokens)
  if cache is not None or rows == batch:
    return layer(hidden, start)

  def split(x):
    return x.reshape(batch // rows, rows, *x.shape[1:])

  def join(x):
    return x.reshape(batch, *x.shape[2:])

  chunks = (split(hidden), split(start))
  out = jax.lax.map(lambda chunk: layer(*chunk), chunks)
  return jax.tree.map(join, out)


def _attend(codec, q, rows, cache, start, position, waves):
  """New tokens attend to a cache, packed or not, and to themselves."""
  if waves is None:
    return attention.attend(q, rows, cache, start, position)
  if codec.fused and q.shape[2] == 1:
    found = codec.attend(q, cache, waves, start, position)
    return attention.join(q, rows, *found)
  past = codec.expand_cache(cache)
  lift = codec.lift(q, waves, start, past['k'].shape[2])
  return attention.attend(q, rows, past, start, position, None, lift)


def _apply_in_place(
  module, codec, weights, hidden, cache, start, position, waves
):
  params = {'params': codec.expand_weights(weights)}
  q, rows = module.apply(params, hidden, method='project')
  new = rows
  if waves is not None:
    new = codec.pack_rows(rows, waves, start, position)
  # Before it is read, lest XLA copy it: attention looks at older columns only.
  cache = {
    name: jax.lax.dynamic_update_slice_in_dim(
      x, new[name].astype(x.dtype), position, CACHE_AXIS
    )
    for name, x in cache.items()
  }
  x = _attend(codec, q, rows, cache, start, position, waves)
  return module.apply(params, hidden, x, method='output'), cache


def _project(module, codec, weights, hidden):
  params = {'params': codec.expand_weights(weights)}
  return module.apply(params, hidden, method='project')


def _output(module, codec, weights, hidden, x):
  params = {'params': codec.expand_weights(weights)}
  return module.apply(params, hidden, x, method='output')


def _pick(module, weights, hidden, params, step, mode):
  """Returns tokens [B], and the same [B, 1] as the next step's input."""
  logits, _ = module.apply({'params': weights}, hidden, None, None, None)
  tokens = sampling.pick(logits, params, step, mode)
  return tokens, tokens[:, None]


def _score(module, weights, hidden, targets, top):
  """hidden [B, T, D], targets [B, T] -> (log-probabilities, are greedy).

  The first are float32 [B, T]; the second, bool [B, T], say which targets no
  other token is likelier than. Where `top` is not 0 there follow the ids of
  the `top` likeliest tokens, int32 [B, T, top], best first, and their
  log-probabilities, float32 of the same shape.

  Positions go through the head a chunk at a time: all logits of a prompt
  would be gigabytes.
  """
  chunk = volume.SCORED_BYTES // (
    4 * module.config.vocab_size * hidden.shape[0]
  )
  if top:
    chunk //= 2  # ranking may sort logits and their ids beside themselves

  def one(columns):
    x, target = columns  # [B, D], [B]
    logits = module.apply({'params': weights}, x[:, None], method='logits')[
      :, 0
    ]
    picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    greedy = picked >= logits.max(axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    if not top:
      return picked - total, greedy
    best, ids = jax.lax.top_k(logits, top)
    return picked - total, greedy, ids, best - total[:, None]

  columns = (hidden.swapaxes(0, 1), targets.T)
  scores = jax.lax.map(one, columns, batch_size=max(1, chunk))
  return tuple(x.swapaxes(0, 1) for x in scores)
