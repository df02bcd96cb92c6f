"""One model in its tiers: planned, filled, and allocated for the work at hand.

It hides from `Session`, which runs blocks, where anything is and how it got
there.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.config import Packing, Policy, Workload
from flexjax.errors import InputError
from flexjax.models import opt
from flexjax.policy.plan import Plan, resolve
from flexjax.policy.problem import Problem
from flexjax.quant import keys
from flexjax.runtime import devices, sources
from flexjax.runtime.codec import Codec
from flexjax.runtime.compute import Compute
from flexjax.runtime.engine import Engine
from flexjax.runtime.formats import Format
from flexjax.runtime.meter import Meter
from flexjax.runtime.store import Store
from flexjax.runtime.weights import Weights
from flexjax.tiers.base import Spec, Tier
from flexjax.tiers.device import DeviceTier
from flexjax.tiers.disk import DiskTier
from flexjax.tiers.host import HostTier
from flexjax.typing import Key

OnProgress = Callable[[str, int, int], None]


class LoadedModel:
  """A source in its tiers, from the first `prepare` on.

  Args:
    source: the model.
    policy: splits may be left open.
    dtype: of weights and compute; 'auto' is decided when the work is known.
    budgets: bytes of device and host; None takes what the machine has.
    disk_dir: None for no disk tier.

  Attributes:
    form: how weights are stored; None until the work is known.
    plan: for the latest work.
    store, engine, compute, meter: there once weights are loaded; `store` is
      None before that and after `close`.
    load_seconds: what loading took.
  """

  def __init__(
    self,
    source: sources.Source,
    policy: Policy,
    *,
    dtype: str,
    budgets: Mapping[str, int | None],
    disk_dir: Path | None,
  ):
    self.source, self.policy = source, policy
    self.machine = devices.machine()
    self.budgets = {
      'device': budgets['device'] or self.machine.device_memory,
      'host': budgets['host'] or self.machine.host_memory,
    }
    self.weights = Weights(source, disk_dir, dtype, policy)
    self.form: Format | None = None
    self.plan: Plan | None = None
    self.load_seconds = 0.0
    self.store: Store | None = None

  def prepare(
    self, work: Workload, wider: Workload | None, on_progress: OnProgress
  ) -> Workload:
    """Plans for a workload and loads weights where that is still to do.

    Args:
      wider: the same work with more batches per block; taken where weights
        must be streamed, because more batches share a load.

    Returns:
      The workload that was planned for.

    Raises:
      InputError: it does not fit, or a directory is not what it should be.
    """
    if self.store is not None:
      fixed = {k: p for k, p in self.store.places.items() if k[0] == 'weights'}
      try:
        self.plan = self._plan(work, wider, self.form, fixed)
      except InputError:
        self.plan = self._plan(work, wider, self.form, None)
        self.close()  # it fits only with the weights elsewhere
    if self.store is None:
      self.form = self.form or self._choose_form(work, wider)
      self.plan = self._plan(work, wider, self.form, None)
      self._load(on_progress)
    assert self.plan is not None
    self.allocate(self.plan)
    return self.plan.problem.work

  def _plan(self, work, wider, form, fixed) -> Plan:
    plan = resolve(self._problem(work, form), self.policy, fixed)
    if wider is not None and plan.placement['weights']['device'] < 1:
      try:
        return resolve(self._problem(wider, form), self.policy, fixed)
      except InputError:
        pass  # too wide: the narrow one fits
    return plan

  def _problem(self, work: Workload, form: Format) -> Problem:
    return Problem(
      config=self.source.config,
      work=work,
      layers=[
        (layer.kind, layer.groups)
        for layer in opt.layers(self.source.config, form.dtype)
      ],
      group_bytes=self.weights.group_bytes(form),
      dtype=form.dtype,
      cache_itemsize=_cache_dtype(form.dtype, self.policy).itemsize,
      packing=form.packing,
      cache_packing=self._cache_packing(form),
      kept=self._waves_bytes(),
      unified=self.machine.unified,
      chunk_tokens=self.machine.chunk_tokens,
      budgets=self.budgets | {'disk': self.weights.disk_budget(form)},
    )

  def _waves_bytes(self) -> int:
    c = self.source.config
    packs = self.policy.cache_bits < 16
    return 4 * c.num_layers * c.hidden_size * keys.TERMS if packs else 0

  def _cache_packing(self, form: Format) -> Packing:
    size = self.policy.group_size or form.packing.group_size
    packing = Packing(self.policy.cache_bits, size)
    if packing.packs:
      try:
        packing.group(self.source.config.head_size)
      except InputError as e:
        raise InputError(
          f'the cache cannot be stored in {packing.bits} bits: {e}'
        ) from None
    return packing

  def _choose_form(self, work: Workload, wider: Workload | None) -> Format:
    weights, config = self.weights, self.source.config
    if weights.settled:
      return weights.form(weights.settled)
    if self.machine.platform != 'cpu':
      return weights.form(config.checkpoint_dtype)
    ranked = [
      weights.form(dtype)
      for dtype in sources.dtypes_by_speed(config, work.batch_size)
    ]
    best: tuple[int, Format] | None = None
    for form in ranked:
      try:
        low = self._plan(work, wider, form, None).peak['disk']
      except InputError:
        continue
      if best is None or low < best[0]:
        best = (low, form)
    return best[1] if best else ranked[-1]  # whose refusal is then raised

  def _load(self, on_progress: OnProgress) -> None:
    try:
      self._fill(on_progress)
    except BaseException:
      self.close()  # else the next use would find half a model
      raise

  def _fill(self, on_progress: OnProgress) -> None:
    assert self.plan is not None
    began = time.perf_counter()
    assert self.form is not None
    m, form = self.machine, self.form
    self.weights.on_profile = lambda done, total: on_progress(
      'profile', done, total
    )
    # Before the tiers are filled: finding them takes a layer's room.
    packing = self.plan.problem.cache_packing
    waves = self.weights.waves(form) if packing.packs else None
    places = {
      int(key[1]): tier
      for key, tier in self.plan.places.items()
      if key[0] == 'weights'
    }
    tiers: dict[str, Tier] = {
      'device': DeviceTier(m.device),
      'host': HostTier(m.pinned, m.device),
    }
    attended = None
    if self.policy.attention == 'host':
      attended = HostTier(m.cpu, m.cpu, None if m.unified else m.pinned)
    self.meter = Meter()
    self.store = Store(tiers, attended, self.meter)
    self._open = [*tiers.values(), *([attended] if attended else [])]
    self._closer = weakref.finalize(self, _close, self._open, self.meter)
    self.weights.fill(
      form,
      places,
      self.store,
      self._open_disk,
      lambda done, total: on_progress('load', done, total),
    )
    layers = opt.layers(self.source.config, form.dtype)
    codec = Codec(
      self.source.config,
      form.dtype,
      form.packing,
      packing,
      form.rounding,
    )
    self.compute = Compute(layers, codec, m.chunk_tokens)
    self.engine = Engine(
      layers,
      self.compute,
      self.store,
      device=m.device,
      pinned=m.pinned,
      cpu=m.cpu,
      host_attention=self.policy.attention == 'host',
    )
    if waves is not None:
      cached = self.plan.problem.cached
      placed = jax.device_put(list(waves), m.device)
      self.engine.waves = dict(zip(cached, placed, strict=True))
      self.store.device.borrow(self.plan.problem.kept)
    self.load_seconds = time.perf_counter() - began

  def _open_disk(self) -> DiskTier:
    """Returns the disk tier; it is opened when something is to go there."""
    assert self.store is not None
    assert self.weights.root is not None
    disk = self.store.tiers.get('disk')
    if disk is None:
      m = self.machine
      disk = DiskTier(self.weights.root, m.pinned, m.device)
      self.store.tiers['disk'] = disk
      self._open.append(disk)
    assert isinstance(disk, DiskTier)
    return disk

  def allocate(self, plan: Plan) -> None:
    """Makes cache and hidden states have the plan's places and shapes."""
    assert self.store is not None
    wanted = self._specs(plan)
    for key in list(self.store.places):
      if key[0] != 'weights' and not self._stands(key, wanted.get(key), plan):
        self.store.free(key)
    for key, spec in wanted.items():
      if key not in self.store.places:
        if plan.places[key] == 'disk':
          self._open_disk()
        self.store.allocate(key, spec, plan.places[key])

  def _stands(self, key: Key, spec: Spec | None, plan: Plan) -> bool:
    assert self.store is not None
    return (
      spec is not None
      and self.store.places[key] == plan.places[key]
      and self.store.spec(key) == spec
    )

  def _specs(self, plan: Plan) -> dict[Key, Spec]:
    assert self.form is not None
    work, config = plan.problem.work, self.source.config
    size, dtype = config.head_size, _cache_dtype(self.form.dtype, self.policy)
    if (packing := plan.problem.cache_packing).packs:
      size, dtype = packing.row_bytes(size, dtype.itemsize), np.dtype(np.uint8)
    cache = jax.ShapeDtypeStruct(
      (work.batch_size, config.num_heads, work.cache_len, size), dtype
    )
    hidden = jax.ShapeDtypeStruct(
      (work.batch_size, work.prompt_len, config.hidden_size),
      jnp.dtype(self.form.dtype),
    )
    specs: dict[Key, Spec] = {
      key: {'k': cache, 'v': cache} for key in plan.problem.sizes('cache')
    }
    return specs | {key: {'x': hidden} for key in plan.problem.sizes('hidden')}

  def forget_state(self) -> None:
    """Frees cache and hidden states, which an error may have left unfit."""
    if self.store is not None:
      for key in list(self.store.places):
        if key[0] != 'weights':
          self.store.free(key)

  def close(self) -> None:
    """Frees every tier and deletes the run's files."""
    if self.store is not None:
      self._closer()
      self.store = None


def _close(tiers: Sequence[Tier], meter: Meter) -> None:
  meter.close()
  for tier in tiers:
    tier.close()


def _cache_dtype(dtype: str, policy: Policy) -> np.dtype:
  """A cache that the CPU attends to in float16 would be slow: float32."""
  if policy.attention == 'host' and dtype == 'float16':
    return np.dtype(np.float32)
  return jnp.dtype(dtype)
