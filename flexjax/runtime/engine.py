"""Executes Actions: fetches through the store, computes through the jitted
layer functions, and hands every token to the decoding.

It holds what is on its way (weights, cache, hidden states by key) and nothing
else; where things live is the store's business, when is the schedule's.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from flexjax.models.opt import MATRICES, Layer
from flexjax.runtime.codec import is_packed
from flexjax.runtime.compute import CACHE_AXIS, Compute
from flexjax.runtime.sampling import Sampling
from flexjax.runtime.store import Store
from flexjax.schedule.zigzag import Action
from flexjax.tiers.base import At, Pending


@dataclasses.dataclass(kw_only=True)
class Batch:
  """What batch k is made of; arrays lie on the device unless said.

  Attributes:
    tokens: [B, T] prompt ids, then [B, 1] the latest token.
    start: [B] columns of padding.
    start_host: the same on the CPU, for attention there.
    sampling: how its rows are continued.
    mode: see `sampling.mode`.
    targets: [B, T] ids to score instead of sampling; None to generate.
    top: how many of the likeliest tokens are scored beside each target.
  """

  tokens: Array
  start: Array
  start_host: Array
  sampling: Sampling
  mode: str
  targets: Array | None = None
  top: int = 0


class Decoding(Protocol):
  """Follows the requests of a block; see `generate.Progress`."""

  def took(self, i: int, k: int, result: Any) -> None:
    """Token i [B] (or the scores, see `compute.score`) of batch k has been
    dispatched."""
    ...


class Engine:
  """Runs blocks.

  Args:
    layers: the model's layers, embed first, head last.
    device, cpu: where computing is done; the same on a CPU backend.
    host_attention: attend to cached rows on the CPU.
    pinned: memory by which small arrays go from device to CPU.

  Attributes:
    share: expand packed weights once for all batches of a visit, not in
      every layer function.
    waves: what the keys of each layer have in common, where the cache is
      packed; see `quant.keys`.
  """

  def __init__(
    self,
    layers: Sequence[Layer],
    compute: Compute,
    store: Store,
    *,
    device: Sharding,
    pinned: Sharding,
    cpu: Sharding,
    host_attention: bool,
  ):
    self.layers, self.compute, self.store = layers, compute, store
    self.device, self.pinned, self.cpu = device, pinned, cpu
    self.host_attention = host_attention
    self.share = False
    self.waves: dict[int, Array] = {}
    self._weights: dict[int, tuple[Pending, int]] = {}
    self._expanded: dict[int, dict[str, Array]] = {}
    self._pending: dict[tuple[str, int, int], Pending] = {}
    self._output: Array | None = None  # of the latest compute, not yet stored
    self._rows: dict[str, Array] | None = None  # its new cache rows
    # By cell, what must be there before it counts as done.
    self._running: dict[tuple[int, int, int], list[Array]] = {}
    self._due: dict[tuple[int, int, int], int] = {}  # bytes free once done
    self._latest = (0, 0, 0)  # the cell computed last
    self._scalars: dict[tuple[Sharding, int], Array] = {}
    self._used: Array | None = None

  def run(
    self,
    actions: Iterable[Action],
    batches: Sequence[Batch],
    prompt_len: int,
    decoding: Decoding,
  ) -> None:
    """Executes a block's actions; ends when all of them are dispatched."""
    self.batches, self.prompt_len = batches, prompt_len
    self.decoding = decoding
    try:
      for action in actions:
        getattr(self, '_' + action.kind)(action.i, action.j, action.k)
    except BaseException:
      # Whoever is interrupted may end the process: XLA must be done by then.
      with suppress(Exception):
        jax.block_until_ready([cell[0] for cell in self._running.values()])
      raise
    finally:
      self._drop_all()

  def resize(
    self, i: int, k: int, keep: np.ndarray, cached: Iterable[int]
  ) -> None:
    """Keeps only rows `keep` of batch k, before its token i is computed."""
    rows = jax.device_put(keep.astype(np.int32), self.device)
    batch, take = self.batches[k], self.compute.take
    for name in ('tokens', 'start'):
      setattr(batch, name, take(getattr(batch, name), rows, axis=0))
    batch.start_host = take(
      batch.start_host, jax.device_put(rows, self.cpu), axis=0
    )
    batch.sampling = Sampling(*(take(x, rows, axis=0) for x in batch.sampling))
    for j in cached:
      self._skip(0, j, k)
      self._shrink(('cache', j, k), rows, self.prompt_len + i - 1)

  def _shrink(self, key, rows: Array, filled: int) -> None:
    place = self.store.places[key]
    spec = {
      name: jax.ShapeDtypeStruct((len(rows), *s.shape[1:]), s.dtype)
      for name, s in self.store.spec(key).items()
    }
    pending = self.store.fetch(key, filled)
    value = pending.result()
    where = next(iter(value.values())).sharding
    index = jax.device_put(rows, where)
    value = {n: self.compute.take(v, index, axis=0) for n, v in value.items()}
    jax.block_until_ready(value)
    pending.release()
    self.store.free(key)
    self.store.allocate(key, spec, place)
    self.store.put(key, value)

  # One method for every kind of Action.

  def _load_weights(self, i: int, j: int, k: int) -> None:
    for group in self.layers[j].groups:
      pending, users = self._weights.get(group, (None, 0))
      if pending is None:
        pending = self.store.fetch(('weights', group))
      self._weights[group] = (pending, users + 1)

  def _free_weights(self, i: int, j: int, k: int) -> None:
    freed = 0
    for group in self.layers[j].groups:
      pending, users = self._weights.pop(group)
      freed += self._drop_expanded(group)
      if users > 1:
        self._weights[group] = (pending, users - 1)
      else:
        # Computes that are not waited for yet; on a CPU they may end in any
        # order, so the latest alone would not do.
        pending.release([running[0] for running in self._running.values()])
    self._free_when_done(freed)

  def _load_cache(self, i: int, j: int, k: int) -> None:
    rows = self.prompt_len + i - 1
    self._pending['cache', j, k] = self.store.fetch(('cache', j, k), rows)

  def _load_hidden(self, i: int, j: int, k: int) -> None:
    self._pending['hidden', j, k] = self.store.fetch(('hidden', k))

  def _compute(self, i: int, j: int, k: int) -> None:
    kind = self.layers[j].kind
    traces = self.compute.traces
    weights = self._weights_of(i, j)
    batch = self.batches[k]
    if kind == 'embed':
      hidden = batch.tokens
    else:
      hidden = self._pending['hidden', j, k].result()['x']
    if kind == 'head':
      self._used = self._finish(i, k, weights, hidden)
    elif kind == 'attention' and self.host_attention and i > 0:
      self._used = self._attend_on_host(i, j, k, weights, hidden)
    else:
      cache = None
      if kind == 'attention' and i > 0:
        cache = self._cached(i, j, k)
      position = self._scalar(self.prompt_len + i - 1 if i else 0)
      if cache is not None and self.store.replaceable(('cache', j, k)):
        self._output, cache = self.compute.attend_in_place(
          weights, hidden, cache, batch.start, position, self.waves.get(j)
        )
        self.store.put(('cache', j, k), cache)
      else:
        self._output, self._rows = self.compute.layer(
          kind,
          weights,
          hidden,
          cache,
          batch.start,
          position,
          self.waves.get(j),
          reread=batch.targets is not None,
        )
      self._used = self._output
    del hidden
    self._running[i, j, k] = [self._used]
    self._latest = (i, j, k)
    self._release(j, k)
    self._free_when_done()
    if (recorder := self.store.recorder) is not None:
      groups, compiled = self.layers[j].groups, self.compute.traces > traces
      recorder.compute(kind, i, j, k, groups, self._used, compiled)

  def _free_when_done(self, nbytes: int = 0) -> None:
    """Counts what has been given back until the latest compute is waited for:
    a device frees it no sooner."""
    nbytes += self.store.take_returned()
    if self._latest in self._running:
      self._due[self._latest] = self._due.get(self._latest, 0) + nbytes
    else:
      self.store.device.borrow(-nbytes)

  def _weights_of(self, i: int, j: int) -> dict[str, Array]:
    """Returns a layer's weights, expanded if several computes share them."""
    # A single batch's step leaves it to the layer function: one call less.
    shared = self.share and (i == 0 or len(self.batches) > 1)
    weights: dict[str, Array] = {}
    for group in self.layers[j].groups:
      if group in self._expanded:
        weights |= self._expanded[group]
        continue
      value = self._weights[group][0].result()
      if shared and any(is_packed(w) for w in value.values()):
        value = self.compute.expand(value)
        self._expanded[group] = value
        if self.store.recorder is not None:
          self.store.recorder.expand(group, value)
        self.store.device.borrow(_matrix_bytes(value))
      weights |= value
    return weights

  def _drop_expanded(self, group: int) -> int:
    """Returns the bytes that this frees."""
    value = self._expanded.pop(group, None)
    return 0 if value is None else _matrix_bytes(value)

  def _attend_on_host(self, i, j, k, weights, hidden) -> Array:
    """Projects on the device, attends on the CPU, projects back."""
    batch = self.batches[k]
    q, rows = self.compute.project(weights, hidden)
    near = jax.device_put((q, rows), self.pinned)
    near = jax.device_put(near, self.cpu)
    self.store.meter.crossed('device_to_host', nbytes=q.nbytes)
    position = self._scalar(self.prompt_len + i - 1, self.cpu)
    attended = self.compute.attend(
      *near, self._cached(i, j, k), batch.start_host, position
    )
    self.store.meter.crossed('host_to_device', nbytes=attended.nbytes)
    x = jax.device_put(attended, self.device)
    if (recorder := self.store.recorder) is not None:
      groups = self.layers[j].groups
      recorder.attend((i, j, k), groups, (q, near[0]), (attended, x))
    self._rows = near[1]
    self._output = self.compute.output(weights, hidden, x)
    return self._output

  def _cached(self, i: int, j: int, k: int) -> dict[str, Array]:
    if ('cache', j, k) not in self._pending:  # dropped when the batch shrank
      self._load_cache(i, j, k)
    return self._pending['cache', j, k].result()

  def _finish(self, i: int, k: int, weights, hidden) -> Array:
    """Returns what is there as soon as this compute has ended."""
    batch = self.batches[k]
    self._output = None
    if batch.targets is not None:
      scores = self.compute.score(weights, hidden, batch.targets, top=batch.top)
      self.decoding.took(i, k, scores)
      return scores[0]
    tokens, batch.tokens = self.compute.pick(
      weights, hidden, batch.sampling, self._scalar(i), mode=batch.mode
    )
    self.decoding.took(i, k, tokens)
    return tokens

  def _store_cache(self, i: int, j: int, k: int) -> None:
    if self._rows is None:  # written in place
      return
    index = self.prompt_len + i - 1 if i else 0
    self.store.put(('cache', j, k), self._rows, At(CACHE_AXIS, index))
    if not i:  # all rows of a prompt: much that has yet to be sent
      self._running[i, j, k] += self.store.sending(('cache', j, k))
    self._rows = None

  def _store_hidden(self, i: int, j: int, k: int) -> None:
    assert self._output is not None
    self.store.put(('hidden', k), {'x': self._output})
    self._output = None

  def _skip(self, i: int, j: int, k: int) -> None:
    self._release(j, k)

  def _wait(self, i: int, j: int, k: int) -> None:
    for x in self._running.pop((i, j, k), []):
      if not x.is_deleted():  # a cache of few layers may have been again
        x.block_until_ready()
    self.store.device.borrow(-self._due.pop((i, j, k), 0))

  def _release(self, j: int, k: int) -> None:
    for kind in ('cache', 'hidden'):
      if (pending := self._pending.pop((kind, j, k), None)) is not None:
        pending.release([] if self._used is None else [self._used])

  def _drop_all(self) -> None:
    running = [running[0] for running in self._running.values()]
    for pending in self._pending.values():
      pending.release(running)
    for pending, _ in self._weights.values():
      pending.release(running)
    freed = sum(self._drop_expanded(group) for group in list(self._expanded))
    freed += sum(self._due.values()) + self.store.take_returned()
    self.store.device.borrow(-freed)
    for left in (self._pending, self._weights, self._running, self._due):
      left.clear()
    self._output = self._rows = self._used = None

  def _scalar(self, value: int, where: Sharding | None = None) -> Array:
    """A committed int32; kept, because each transfer costs Python time."""
    key = (where or self.device, value)
    if key not in self._scalars:
      self._scalars[key] = jax.device_put(np.int32(value), key[0])
    return self._scalars[key]


def _matrix_bytes(weights: dict[str, Array]) -> int:
  return sum(w.nbytes for name, w in weights.items() if name in MATRICES)
