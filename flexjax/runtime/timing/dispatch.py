"""Times the thread that dispatches: the engine itself, at work on a model so
small that there is next to nothing to compute or to move."""

import collections
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.config import UNPACKED, ModelConfig
from flexjax.models import opt
from flexjax.runtime import sampling
from flexjax.runtime.codec import Codec
from flexjax.runtime.compute import Compute
from flexjax.runtime.engine import Batch, Engine
from flexjax.runtime.formats import Format
from flexjax.runtime.meter import Meter
from flexjax.runtime.store import Store
from flexjax.runtime.timing.stopwatch import Stopwatch
from flexjax.schedule.zigzag import Action, Shape, actions, zigzag
from flexjax.tiers.base import Spec
from flexjax.tiers.device import DeviceTier
from flexjax.tiers.host import HostTier
from flexjax.typing import Key


def _model(width: int) -> ModelConfig:
  return ModelConfig(
    num_layers=4,
    num_heads=width // 16 if width < 512 else width // 64,
    hidden_size=width,
    ffn_size=4 * width,
    embed_size=width,
    vocab_size=2 * width,
    max_positions=64,
  )


# An accelerator launches as many kernels as for a large model; a CPU would
# take longer to compute than to dispatch.
_MODELS = {'cpu': (_model(64), 'float32')}
_OTHER = (_model(512), 'bfloat16')
_PROMPT_LEN = 1  # a prefill is then compiled with the decode steps
_BATCH_SIZE, _NUM_BATCHES, _STEPS = 4, 2, 17
_DEPTH = 2
_RUNS = 5
_LEAST = 1e-6


def dispatch(watch: Stopwatch) -> dict[str, float]:
  """Seconds of the dispatching thread per computed cell, per value that is
  read from another tier, and per value that is written to one.

  What is written is a cache: hidden states, a single array, take less.
  """
  tiny = _Tiny(watch)
  try:
    here = tiny.seconds('device', 'device')
    weights_there = tiny.seconds('host', 'device')
    cache_there = tiny.seconds('device', 'host')
  finally:
    tiny.close()
  count = tiny.count
  read = max(_LEAST, (weights_there - here) / tiny.groups)
  write = (cache_there - here - count['load_cache'] * read) / count[
    'store_cache'
  ]
  return {
    'compute': max(_LEAST, here / count['compute']),
    'read': read,
    'write': max(_LEAST, write),
  }


class _Ignore:
  """Nobody follows the tokens."""

  def took(self, i: int, k: int, result: Any) -> None:
    pass


class _Tiny:
  """A small model in an engine of its own."""

  def __init__(self, watch: Stopwatch):
    machine = watch.machine
    config, dtype = _MODELS.get(machine.platform, _OTHER)
    self._watch, self._meter = watch, Meter()
    tiers = {
      'device': DeviceTier(machine.device),
      'host': HostTier(machine.pinned, machine.device),
    }
    self._store = Store(tiers, None, self._meter)
    layers = opt.layers(config, dtype)
    codec = Codec(config, dtype, UNPACKED, UNPACKED)
    self.engine = Engine(
      layers,
      Compute(layers, codec, machine.chunk_tokens),
      self._store,
      device=machine.device,
      pinned=machine.pinned,
      cpu=machine.cpu,
      host_attention=False,
    )
    cached = [j for j, layer in enumerate(layers) if layer.kind == 'attention']
    self._shape = Shape(_STEPS, len(layers), _NUM_BATCHES, frozenset(cached))
    todo = list(self._actions())
    self.count = collections.Counter(action.kind for action in todo)
    self.groups = sum(
      len(layers[action.j].groups)
      for action in todo
      if action.kind == 'load_weights'
    )
    self._weights: dict[Key, Spec] = {
      ('weights', g): spec for g, spec in enumerate(Format(dtype).specs(config))
    }
    self._state = _state_specs(config, dtype, cached)

  def _actions(self) -> Iterator[Action]:
    """What to do, found while it is done: that takes the dispatcher's time."""
    return actions(self._shape, zigzag(self._shape), depth=_DEPTH)

  def seconds(self, weights: str, cache: str) -> float:
    """Returns the seconds of a block with weights, and with the cache, in the
    tiers of these names: a device may let its dispatcher wait though it has
    next to nothing to do."""
    places = dict.fromkeys(self._weights, weights)
    for key in self._state:
      places[key] = cache if key[0] == 'cache' else 'device'
    specs = self._weights | self._state
    for key, place in places.items():
      self._store.allocate(key, specs[key], place)
    for key, spec in self._weights.items():
      value = {
        n: self._watch.numbers(s.shape, s.dtype) for n, s in spec.items()
      }
      self._store.put(key, value)
    self._run()  # compiles
    usual = statistics.median(self._run() for _ in range(_RUNS))
    for key in places:
      self._store.free(key)
    return usual

  def _run(self) -> float:
    batches = [self._batch() for _ in range(_NUM_BATCHES)]
    began = time.perf_counter()
    self.engine.run(self._actions(), batches, _PROMPT_LEN, _Ignore())
    jax.block_until_ready([batch.tokens for batch in batches])
    return time.perf_counter() - began

  def _batch(self) -> Batch:
    machine, rows = self._watch.machine, np.arange(_BATCH_SIZE)
    params = sampling.pack([None] * _BATCH_SIZE, rows)
    zeros = [0] * _BATCH_SIZE
    return Batch(
      tokens=self._watch.integers([[5]] * _BATCH_SIZE),
      start=self._watch.integers(zeros),
      start_host=self._watch.integers(zeros, machine.cpu),
      sampling=jax.device_put(params, machine.device),
      mode='greedy',
    )

  def close(self) -> None:
    self._meter.close()
    for tier in self._store.tiers.values():
      tier.close()


def _state_specs(
  c: ModelConfig, name: str, cached: list[int]
) -> dict[Key, Spec]:
  dtype = jnp.dtype(name)
  columns = _PROMPT_LEN + _STEPS - 1
  rows = jax.ShapeDtypeStruct(
    (_BATCH_SIZE, c.num_heads, columns, c.head_size), dtype
  )
  hidden = jax.ShapeDtypeStruct(
    (_BATCH_SIZE, _PROMPT_LEN, c.hidden_size), dtype
  )
  specs: dict[Key, Spec] = {}
  for k in range(_NUM_BATCHES):
    specs['hidden', k] = {'x': hidden}
    for j in cached:
      specs['cache', j, k] = {'k': rows, 'v': rows}
  return specs
