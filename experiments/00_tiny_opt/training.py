"""Trains a small OPT made of the project's own Flax modules.

It hides from `run.py` how a step is computed: the forward pass calls the
modules of `flexjax.models.opt` and keeps to itself only what inference does
not have, dropout and an attention that a backward pass likes. Data, state and
the best weights so far stay on the device; many steps are one dispatch.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import Array

from flexjax.config import ModelConfig
from flexjax.models import opt

BOS_ID = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How to train.

  Attributes:
    steps: optimisation steps, at most.
    max_seconds: the cosine is shortened so that training ends by then, counted
      from `begun`; 0 sets no limit and makes the run a function of the seed.
    chunk: steps in one dispatch.
    eval_every: steps between evaluations, a multiple of `chunk`.
    compute: dtype of matrices in products; norms, softmax, sums are float32.
  """

  batch_size: int
  steps: int
  max_seconds: float
  warmup: int
  learning_rate: float
  weight_decay: float
  dropout: float
  chunk: int
  eval_every: int
  compute: str
  seed: int
  begun: float


class Data(NamedTuple):
  """On the device: the stream, where windows begin, two sets of chunks.

  Attributes:
    stream: [tokens] uint16.
    starts: [tokens] int32, see `corpus.window_starts`.
    held_out, seen: [batches, B, T] int32 for evaluation, -1 after the end.
  """

  stream: Array
  starts: Array
  held_out: Array
  seen: Array


class State(NamedTuple):
  step: Array
  weights: tuple
  moments: optax.OptState


class Row(NamedTuple):
  """A line of results.csv; losses are nats per token."""

  step: int
  train_loss: float
  seen_loss: float
  held_out_loss: float
  held_out_perplexity: float
  learning_rate: float
  tokens: int
  seconds: float


def init(config: ModelConfig, seed: int) -> tuple:
  """Returns float32 weight groups; residual branches start small (GPT-2)."""
  shapes = opt.weight_groups(config)
  groups: list[dict[str, Array]] = [{} for _ in shapes]
  start = jnp.zeros(1, jnp.int32)
  key = jax.random.key(seed)
  small = (2 * config.num_layers) ** -0.5
  for n, layer in enumerate(opt.layers(config, jnp.float32)):
    x = jnp.zeros((1, 2), jnp.int32)
    if layer.kind != 'embed':
      x = jnp.zeros((1, 2, config.hidden_size))
    made = layer.module.init(jax.random.fold_in(key, n), x, None, start, 0)
    for g in layer.groups:
      for name in shapes[g]:
        w = made['params'][name]
        w = w * small if name in ('out', 'fc2') else w
        groups[g].setdefault(name, w)
  return tuple(groups)


def attend(q: Array, rows: Array) -> Array:
  """As `models.attention.attend`, without padding or cache, all at once."""
  t = q.shape[2]
  s = jnp.einsum('bnth,bnsh->bnts', q, rows[0])
  s = jnp.where(jnp.tri(t, dtype=bool), s.astype(jnp.float32), -1e30)
  p = jax.nn.softmax(s, axis=-1).astype(q.dtype)
  return jnp.einsum('bnts,bnsh->bnth', p, rows[1])


def attend_fused(q: Array, rows: Array) -> Array:
  """The same by cuDNN, which never stores the scores."""
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, rows[0], rows[1]))
  x = jax.nn.dot_product_attention(
    q, k, v, scale=1.0, is_causal=True, implementation='cudnn'
  )
  return x.transpose(0, 2, 1, 3)


def choose_attention(config: ModelConfig, compute: str) -> Callable:
  """Returns the fused attention where it works and agrees, else the plain."""
  if jax.default_backend() != 'gpu' or compute != 'bfloat16':
    return attend
  shape = (4, 2, config.num_heads, config.max_positions, config.head_size)
  x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)

  def slopes(f):
    return jax.jit(
      jax.grad(lambda x: (f(x[0], x[1:3]) * x[3]).astype(jnp.float32).sum())
    )(x)

  try:
    a, b = (slopes(f).astype(jnp.float32) for f in (attend_fused, attend))
    error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
    logging.info('fused attention: gradients differ by %.4f', error)
    return attend_fused if error < 0.05 else attend
  except Exception as e:  # Whatever cuDNN dislikes, the plain one works.
    logging.warning('no fused attention: %s', str(e)[:300])
    return attend


def logits(
  config: ModelConfig,
  weights: tuple,
  tokens: Array,
  compute: str = 'float32',
  attention: Callable = attend,
  key: Array | None = None,
  rate: float = 0.0,
) -> Array:
  """tokens [B, T] -> float32 logits [B, T, V]; dropout where `rate` > 0."""

  def cast(w):
    return w.astype(compute) if w.ndim > 1 else w

  def drop(x, n):
    if not rate:
      return x
    keep = jax.random.bernoulli(jax.random.fold_in(key, n), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)

  start = jnp.zeros(tokens.shape[0], jnp.int32)
  x = tokens
  for n, (kind, module, groups) in enumerate(opt.layers(config, compute)):
    w = {k: cast(a) for g in groups for k, a in weights[g].items()}
    run = functools.partial(module.apply, {'params': w})
    if kind == 'embed':
      # The residual stream is float32, whatever the products are in.
      x = drop(run(x, None, start, 0)[0].astype(jnp.float32), n)
    elif kind == 'attention':
      y = run(x, attention(*run(x, method='project')), method='output')
      x = x + drop(y - x, n)
    elif kind == 'mlp':
      x = x + drop(run(x, None, start, 0)[0] - x, n)
  return run(x, method='logits')


def with_bos(labels: Array) -> Array:
  """labels [B, T] -> the inputs that predict them: `</s>`, then all but one."""
  bos = jnp.full((labels.shape[0], 1), BOS_ID, labels.dtype)
  return jnp.concatenate([bos, jnp.maximum(labels[:, :-1], 0)], axis=1)


def losses(y: Array, labels: Array) -> tuple[Array, Array]:
  """Returns the summed loss in nats and the number of labels that count."""
  each = optax.softmax_cross_entropy_with_integer_labels(
    y, jnp.maximum(labels, 0)
  )
  return jnp.where(labels >= 0, each, 0).sum(), (labels >= 0).sum()


def chunks(stream: np.ndarray, batch_size: int, length: int, limit: int = 0):
  """Cuts every document into chunks of `length` labels, -1 after its end.

  Returns [batches, B, T] int32; with a `limit`, that many chunks, evenly
  spread.
  """
  ends = np.flatnonzero(stream == BOS_ID)
  rows = [
    stream[at : min(at + length, end)]
    for begin, end in zip(ends[:-1] + 1, ends[1:], strict=True)
    for at in range(begin, end, length)
  ]
  if limit and limit < len(rows):
    rows = [rows[n * len(rows) // limit] for n in range(limit)]
  count = -(-len(rows) // batch_size) * batch_size
  out = np.full((count, length), -1, np.int32)
  for n, row in enumerate(rows):
    out[n, : len(row)] = row
  return out.reshape(-1, batch_size, length)


def evaluator(config: ModelConfig, compute: str, attention: Callable):
  """Returns jitted (weights, [batches, B, T]) -> mean loss per token."""

  @jax.jit
  def evaluate(weights, batches):
    def one(labels):
      y = logits(config, weights, with_bos(labels), compute, attention)
      return losses(y, labels)

    total, count = jax.lax.map(one, batches)
    return total.sum() / count.sum()

  return evaluate


def stepper(config: ModelConfig, recipe: Recipe, attention: Callable):
  """Returns (optimizer, jitted chunk of steps).

  The chunk maps (state, data, total steps) to (state, mean loss, rate) and
  takes over `state`'s buffers.
  """

  def decays(weights):
    return jax.tree.map(lambda w: w.ndim > 1, weights)

  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.95),
    optax.add_decayed_weights(recipe.weight_decay, mask=decays),
  )
  # Random bits for dropout are a cost; the hardware's generator is cheaper.
  kind = 'rbg' if jax.default_backend() == 'gpu' else 'threefry2x32'
  seed = jax.random.key(recipe.seed + 1, impl=kind)

  def loss(weights, labels, key):
    y = logits(
      config,
      weights,
      with_bos(labels),
      recipe.compute,
      attention,
      key,
      recipe.dropout,
    )
    total, count = losses(y, labels)
    return total / count

  def step(data, total, state):
    pick, drop = jax.random.split(jax.random.fold_in(seed, state.step))
    at = jax.random.randint(
      pick, (recipe.batch_size,), 0, len(data.stream) - config.max_positions
    )
    at = jnp.minimum(data.starts[at], len(data.stream) - config.max_positions)
    labels = data.stream[at[:, None] + jnp.arange(config.max_positions)]
    value, slopes = jax.value_and_grad(loss)(
      state.weights, labels.astype(jnp.int32), drop
    )
    rate = schedule(recipe, state.step, total)
    updates, moments = optimizer.update(slopes, state.moments, state.weights)
    updates = jax.tree.map(lambda u: -rate * u, updates)
    weights = optax.apply_updates(state.weights, updates)
    return State(state.step + 1, weights, moments), (value, rate)

  @functools.partial(jax.jit, donate_argnums=0)
  def run(state, data, total):
    state, (values, rates) = jax.lax.scan(
      lambda s, _: step(data, total, s), state, length=recipe.chunk
    )
    return state, values.mean(), rates[-1]

  return optimizer, run


def schedule(recipe: Recipe, step: Array, total: Array) -> Array:
  """Linear warm-up, then a cosine down to a fiftieth of the peak."""
  warm = (step + 1) / recipe.warmup
  done = (step - recipe.warmup) / jnp.maximum(total - recipe.warmup, 1)
  cosine = 0.51 + 0.49 * jnp.cos(jnp.pi * jnp.clip(done, 0, 1))
  return recipe.learning_rate * jnp.minimum(warm, cosine)


def train(
  config: ModelConfig, recipe: Recipe, data: Data
) -> Iterator[tuple[Row, tuple]]:
  """Trains; yields a row and the weights at every evaluation.

  The weights are the run's own buffers: copy them before the next row.
  """
  attention = choose_attention(config, recipe.compute)
  evaluate = evaluator(config, recipe.compute, attention)
  optimizer, chunk = stepper(config, recipe, attention)
  weights = init(config, recipe.seed)
  state = State(jnp.int32(0), weights, jax.jit(optimizer.init)(weights))
  begun = time.monotonic()
  compiled = chunk.lower(state, data, jnp.int32(0)).compile()
  evaluate(weights, data.held_out).block_until_ready()
  evaluate(weights, data.seen).block_until_ready()
  logging.info('compiled in %.1f s', time.monotonic() - begun)

  total, done, marks = recipe.steps, 0, []
  values = []
  while done < total:
    state, value, rate = compiled(state, data, jnp.int32(total))
    values.append(value)
    done += recipe.chunk
    value.block_until_ready()
    marks.append((done, time.monotonic()))
    if recipe.max_seconds and len(marks) > 1:  # The first one loads kernels.
      total = min(recipe.steps, _reachable(recipe, marks))
    if done % recipe.eval_every == 0 or done >= total:
      seen, held_out = jax.device_get(
        [evaluate(state.weights, x) for x in (data.seen, data.held_out)]
      )
      yield (
        Row(
          step=done,
          train_loss=float(np.mean(jax.device_get(values))),
          seen_loss=float(seen),
          held_out_loss=float(held_out),
          held_out_perplexity=float(np.exp(held_out)),
          learning_rate=float(rate),
          tokens=done * recipe.batch_size * config.max_positions,
          seconds=time.monotonic() - recipe.begun,
        ),
        state.weights,
      )
      values = []


def _reachable(recipe: Recipe, marks: list[tuple[int, float]]) -> int:
  """Returns the last step that time allows, evaluations included."""
  (first, then), (done, now) = marks[max(0, len(marks) - 11)], marks[-1]
  step_s = (now - then) / (done - first)
  left = max(0.0, recipe.begun + recipe.max_seconds - now)
  chunks_left = int(left / step_s / recipe.chunk * 0.98)
  return done + chunks_left * recipe.chunk


def complete(
  config: ModelConfig,
  weights: tuple,
  prompts: list[list[int]],
  new: int,
  temperature: float,
  seed: int,
) -> list[list[int]]:
  """Continues prompts by `new` tokens each; cache-free, one dispatch."""
  lengths = jnp.array([len(p) for p in prompts])
  width = max(len(p) for p in prompts) + new
  tokens = np.full((len(prompts), width), BOS_ID, np.int32)
  for n, p in enumerate(prompts):
    tokens[n, : len(p)] = p

  @jax.jit
  def run(weights, tokens):
    rows = jnp.arange(len(prompts))

    def body(n, tokens):
      y = logits(config, weights, tokens)[rows, lengths + n - 1]
      key = jax.random.fold_in(jax.random.key(seed), n)
      noise = temperature * jax.random.gumbel(key, y.shape)
      return tokens.at[rows, lengths + n].set((y + noise).argmax(-1))

    return jax.lax.fori_loop(0, new, body, tokens)

  out = np.asarray(run(weights, tokens))
  return [out[n, : len(p) + new].tolist() for n, p in enumerate(prompts)]
