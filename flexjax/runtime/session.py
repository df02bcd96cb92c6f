"""Runs blocks of requests through a loaded model, and keeps the figures.

It hides store, engine and schedule from `LLM`, which knows prompts and requests
only.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from flexjax.config import Workload
from flexjax.data.blocks import Block
from flexjax.errors import InputError
from flexjax.policy import cost
from flexjax.policy.plan import Plan
from flexjax.runtime import devices, sampling
from flexjax.runtime.engine import Batch
from flexjax.runtime.generate import Progress, Request
from flexjax.runtime.loaded import LoadedModel
from flexjax.runtime.recorder import Recorder
from flexjax.runtime.stats import Stats
from flexjax.runtime.timeline import Span
from flexjax.schedule.zigzag import ORDERS, Shape, actions

_TOTALS = (
  'prefill_seconds',
  'decode_seconds',
  'generated_tokens',
  'scored_tokens',
  'first_tokens',
)
_NEVER = 2**31 - 1  # of younger collections, before a full one
_SIZE_FUNCTIONS = 6  # compiled anew for a new batch size


class Session:
  """A loaded model at work.

  Attributes:
    spans: of the latest run, if it was recorded.
  """

  def __init__(self, loaded: LoadedModel):
    self.loaded = loaded
    self._stats = Stats()
    self.spans: list[Span] = []

  @contextmanager
  def measured(self, record: bool = False) -> Iterator[None]:
    """Collects the figures of what runs inside, and its spans if wanted."""
    loaded = self.loaded
    store = loaded.store
    assert store is not None
    self._totals: dict[str, Any] = dict.fromkeys(_TOTALS, 0)
    self._blocks = 0
    links = dict(loaded.meter.link_bytes)
    busy, began = loaded.meter.busy_seconds, time.perf_counter()
    store.reset_peaks()
    self.spans = []
    recorder = store.recorder = Recorder() if record else None
    try:
      yield
    finally:
      if loaded.store is not None:  # else it was closed meanwhile
        self._measure(links, busy, time.perf_counter() - began)
      if store.recorder is recorder:  # else another run has begun
        store.recorder = None
      if recorder is not None:
        self.spans = recorder.close()

  def _measure(
    self, links: Mapping[str, int], busy: float, seconds: float
  ) -> None:
    loaded = self.loaded
    assert loaded.store is not None
    assert loaded.choice is not None
    assert loaded.form is not None
    crossed = loaded.meter.link_bytes
    self._stats = Stats(
      **self._totals,
      peak_bytes=loaded.store.peak_bytes(),
      link_bytes={link: n - links[link] for link, n in crossed.items()},
      link_busy_fraction=(loaded.meter.busy_seconds - busy) / seconds,
      placement=loaded.plan.placement,
      compilations=loaded.compute.traces,
      load_seconds=loaded.load_seconds,
      stored={
        **loaded.form.to_json(),
        'cache_bits': loaded.policy.cache_bits,
      },
      block={
        'batch_size': loaded.plan.problem.work.batch_size,
        'num_batches': loaded.plan.problem.work.num_batches,
        'attention': loaded.plan.policy.attention,
      },
      allocator_peak_bytes=devices.allocator_peak(loaded.machine),
      predicted={
        **loaded.choice.prediction.to_json(self._blocks),
        'planned_bytes': loaded.choice.plan.peak,
      },
    )

  def stats(self) -> Stats:
    return self._stats

  def run(
    self,
    block: Block,
    requests: Sequence[Request],
    work: Workload,
    on_token: Callable[[int, int], None],
  ) -> None:
    """Generates for one block; its requests are finished afterwards."""
    plan = self._check_current(work)
    self.loaded.allocate(plan)  # an earlier block may have shrunk
    mine = [requests[n] for n in block.index[block.index >= 0]]
    steps = max(r.params.max_new_tokens for r in mine)
    progress = Progress(
      block,
      requests,
      lambda i, k, keep: self.loaded.engine.resize(
        i, k, keep, plan.problem.cached
      ),
      self._is_worth,
      on_token,
    )
    self._progress = progress
    self._sizes = {work.batch_size}
    batches = [self._batch(block, k, requests) for k in range(len(block.ids))]
    self._execute(progress, batches, work, steps)
    progress.finish()
    self._blocks += 1
    self._totals['prefill_seconds'] += progress.prefill_seconds
    self._totals['decode_seconds'] += progress.decode_seconds
    self._totals['generated_tokens'] += sum(len(r.ids) for r in mine)
    self._totals['first_tokens'] += len(mine)

  def _check_current(self, work: Workload) -> Plan:
    """Returns the plan if it is still the one that was made for `work`."""
    if self.loaded.store is None or self.loaded.choice is None:
      raise InputError('the model has been closed')
    if self.loaded.plan.problem.work is not work:
      raise InputError(
        'this stream has ended: its model has been used for other prompts'
      )
    return self.loaded.plan

  def score(
    self, block: Block, work: Workload, top: int
  ) -> list[tuple[int, tuple[np.ndarray, ...]]]:
    """Scores each column's next token.

    Returns:
      (k, ([B, T] log-probabilities, [B, T] whether it is the likeliest)); where
      `top` is not 0 the pair goes on with the ids and the log-probabilities of
      the `top` likeliest tokens, each [B, T, top].
    """
    self._check_current(work)
    began = time.perf_counter()
    collect = _Collect(block)
    batches = [self._batch(block, k, None, top) for k in range(len(block.ids))]
    self._execute(collect, batches, work, 1)
    scores = jax.device_get(collect.results)
    self._blocks += 1
    self._totals['prefill_seconds'] += time.perf_counter() - began
    real = block.index >= 0
    self._totals['scored_tokens'] += int(
      (block.ids.shape[2] - block.start - 1)[real].sum()
    )
    return sorted(scores.items())

  def _execute(self, decoding, batches, work: Workload, steps: int) -> None:
    problem, policy = self.loaded.plan.problem, self.loaded.plan.policy
    shape = Shape(
      steps,
      len(self.loaded.engine.layers),
      work.num_batches,
      frozenset(problem.cached),
    )
    self.loaded.engine.share = problem.share
    todo = actions(
      shape,
      ORDERS[policy.schedule](shape),
      depth=policy.prefetch_depth,
      overlap=policy.overlap,
      run_ahead=cost.run_ahead(problem, policy),
      wanted=decoding.wanted,
    )
    if (recorder := self.loaded.engine.store.recorder) is not None:
      todo = recorder.dispatched(todo)
    try:
      with jax.transfer_guard('disallow'), _full_collections_later():
        self.loaded.engine.run(todo, batches, work.prompt_len, decoding)
    except BaseException:
      self.loaded.forget_state()
      raise

  def _batch(
    self,
    block: Block,
    k: int,
    requests: Sequence[Request] | None,
    top: int = 0,
  ) -> Batch:
    """Puts batch k on the device; without requests it is to be scored."""
    device, cpu = self.loaded.machine.device, self.loaded.machine.cpu
    index = block.index[k]
    params = [
      requests[n].params if requests and n >= 0 else None for n in index
    ]
    targets = None
    if requests is None:
      following = np.roll(block.ids[k], -1, axis=1)
      targets = jax.device_put(following, device)
    return Batch(
      tokens=jax.device_put(block.ids[k], device),
      start=jax.device_put(block.start[k], device),
      start_host=jax.device_put(block.start[k], cpu),
      sampling=jax.device_put(sampling.pack(params, index), device),
      mode=sampling.mode(params),
      targets=targets,
      top=top,
    )

  def _is_worth(self, k: int, size: int, steps: int) -> bool:
    """Whether smaller batches save more time than compiling takes."""
    old = self.loaded.engine.batches[k].start.shape[0]
    saved = steps * self._progress.step_seconds * (1 - size / old)
    compiling = self.loaded.compute.trace_seconds / max(
      self.loaded.compute.traces, 1
    )
    cost = 0.0 if size in self._sizes else _SIZE_FUNCTIONS * compiling
    if saved > cost:
      self._sizes.add(size)
    return saved > cost


class _Collect:
  """Takes a block's scores in; no class of its own for every block, because
  classes are cycles, which keep what they refer to until they are collected."""

  def __init__(self, block: Block):
    self.block = block
    self.results: dict[int, tuple[jax.Array, ...]] = {}

  def took(self, i: int, k: int, result: Any) -> None:
    self.results[k] = result

  def wanted(self, i: int, k: int, now: bool) -> bool:
    return bool((self.block.index[k] >= 0).any())


@contextmanager
def _full_collections_later() -> Iterator[None]:
  """Puts off what takes Python's cyclic collector longest, looking at all
  objects: JAX's take 0.1 s, six decode steps of a small model."""
  before = gc.get_threshold()
  try:
    if before[2] != _NEVER:  # else another run's
      gc.set_threshold(*before[:2], _NEVER)
    yield
  finally:
    if before[2] != _NEVER:
      gc.set_threshold(*before)
