"""What packing wants to know of a model, found out without data.

One row of random tokens, as long as the context, goes through the model layer
by layer. It shows what every matrix is multiplied by, which says what
its errors do, and what the keys have in common at each position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexjax.config import ModelConfig
from flexjax.models import opt
from flexjax.quant import keys
from flexjax.quant.groupwise import Moments
from flexjax.runtime.codec import Codec
from flexjax.runtime.loading import read_group
from flexjax.tiers.base import Spec
from flexjax.typing import WeightSource

_LEAST = 0.01  # of a column's square, in parts of the mean
_SOME_ROWS = 512
_DIRECTIONS = 8


class Profile(NamedTuple):
  """What a model's own activations look like.

  Attributes:
    moments: of every weight group, matrix name -> what is known of the vectors
      it is multiplied by, as NumPy arrays.
    waves: [num_layers, N, H, R], see `quant.keys`.
  """

  moments: list[dict[str, Moments]]
  waves: np.ndarray


def profile(
  source: WeightSource,
  specs: Sequence[Spec],
  config: ModelConfig,
  codec: Codec,
  on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
  """Runs the model once, holding one layer's weights at a time.

  A function of the weights alone: whoever repeats it gets the same.

  Args:
    specs: of the source's weight groups; packed matrices are expanded.
  """
  moments: list[dict[str, Moments]] = [{} for _ in specs]
  waves = []
  options = None
  if jax.default_backend() == 'gpu':
    # Else each compilation picks its own kernels by trying them out.
    options = {'xla_gpu_deterministic_ops': True, 'xla_gpu_autotune_level': 0}
  run = jax.jit(_run, static_argnums=(0, 1), compiler_options=options)
  hidden = jnp.asarray(_tokens(config))
  layers = opt.layers(config, codec.dtype)[:-1]
  for done, layer in enumerate(layers):
    on_layer(done, len(layers))
    weights: dict[str, Any] = {}
    for group in layer.groups:
      weights |= read_group(source, group, specs[group], codec.dtype)
    hidden, wave, found = run(layer.module, codec, weights, hidden)
    if wave is not None:
      waves.append(np.asarray(wave))
    moments[layer.groups[-1]] = jax.device_get(found)
  return Profile(moments, np.stack(waves))


def _run(module, codec: Codec, weights: dict[str, Array], hidden: Array):
  params = {'params': codec.expand_weights(weights)}
  start = jnp.zeros(1, jnp.int32)
  (hidden, rows), seen = module.apply(
    params, hidden, None, start, 0, mutable=['inputs']
  )
  wave = keys.fit(rows['k'][0]) if rows else None
  inputs = seen.get('inputs', {})
  return hidden, wave, {name: _moments(x[0]) for name, x in inputs.items()}


def _moments(x: Array) -> Moments:
  """x [T, columns] -> its second moment, the main directions of some rows."""
  x = x.astype(jnp.float32)
  squares = jnp.square(x).mean(0)
  # What is never used here may be elsewhere; nor may all be zero.
  squares = squares + _LEAST * squares.mean() + 1e-30
  some = x[:: -(-len(x) // _SOME_ROWS)]
  with jax.default_matmul_precision('highest'):
    _, vectors = jnp.linalg.eigh(some @ some.T)
    main = vectors[:, -_DIRECTIONS:]
    return Moments(squares, some.T @ main / len(some) ** 0.5)


def _tokens(config: ModelConfig) -> np.ndarray:
  rng = np.random.default_rng(0)
  ids = rng.integers(0, config.vocab_size, (1, config.max_positions), np.int32)
  if config.bos_id >= 0:
    ids[0, 0] = config.bos_id
  return ids


def no_profile(config: ModelConfig, groups: int) -> Profile:
  """Nothing known: of random weights, which have no structure to find."""
  shape = (config.num_layers, config.num_heads, config.head_size, keys.TERMS)
  return Profile([{} for _ in range(groups)], np.zeros(shape, np.float32))
