"""One model in its tiers: planned, filled, and allocated for the work at hand.

It hides from `Session`, which runs blocks, where anything is and how it got
there.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.config import Policy, Workload
from flexjax.errors import InputError
from flexjax.hardware import Hardware
from flexjax.models import opt
from flexjax.policy.plan import Plan
from flexjax.policy.search import Request
from flexjax.runtime import calibrate, devices, sources
from flexjax.runtime.codec import Codec
from flexjax.runtime.compute import Compute
from flexjax.runtime.engine import Engine
from flexjax.runtime.formats import Format
from flexjax.runtime.meter import Meter
from flexjax.runtime.planner import Choice, Machine, Planner, cache_choices
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
    policy: what is None in it is open.
    dtype: of weights and compute; 'auto' is decided when the work is known.
    budgets: bytes of device and host; None takes what the machine has.
    disk_dir: None for no disk tier.
    record: what the machine can do; None looks for it, or measures it, when
      there is something to plan.
    allow_lossy: bits of weights and cache that are not given may be 4.

  Attributes:
    form: how weights are stored; None until the work is known.
    choice: the plan for the latest work, and what it is expected to take.
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
    record: Hardware | None = None,
    allow_lossy: bool = False,
  ):
    self.source, self.policy = source, policy
    self.machine = devices.machine()
    self.budgets = {
      'device': budgets['device'] or self.machine.device_memory,
      'host': budgets['host'] or self.machine.host_memory,
    }
    self.weights = Weights(source, disk_dir, dtype, policy)
    self.form: Format | None = None
    self.choice: Choice | None = None
    self.load_seconds = 0.0
    self.store: Store | None = None
    if record is not None and record.platform != self.machine.platform:
      raise InputError(
        f"the record of '{record.name}' is of a {record.platform}; this "
        f'machine computes on a {self.machine.platform}'
      )
    self._record, self._lossy = record, allow_lossy
    # A record that is not given is measured again for a disk.
    known = record is None or record.knows_disk
    flag = 'another --disk_dir' if disk_dir else '--disk_dir'
    self._disk_flag = flag if known else ''
    self._chosen: dict[Any, Choice] = {}

  @property
  def plan(self) -> Plan:
    """The plan for the latest work."""
    assert self.choice is not None
    return self.choice.plan

  def prepare(
    self, request: Request, watched: bool, on_progress: OnProgress
  ) -> Workload:
    """Plans for a request and loads weights where that is still to do.

    Args:
      watched: some of its prompts may stop early.

    Returns:
      The workload that was planned for.

    Raises:
      InputError: it does not fit, or a directory is not what it should be.
    """
    self._find_record(on_progress)
    if self.store is not None:
      try:
        self.choice = self._choose(request, watched, self._fixed())
      except InputError:
        self.choice = self._choose(request, watched, None)
        self.close()  # it fits only with the weights elsewhere
    if self.store is None:
      self.choice = self._choose(request, watched, None)
      self.form = self.choice.form
      # From now on these are what was loaded and compiled for.
      self.policy = dataclasses.replace(
        self.policy,
        attention=self.plan.policy.attention,
        weight_bits=self.plan.policy.weight_bits,
        cache_bits=self.plan.policy.cache_bits,
      )
      self._load(on_progress)
      # The same request again is not planned anew around these weights, lest
      # another block be found, to compile for.
      self._chosen[self._key(request, watched, self._fixed())] = self.choice
    self.allocate(self.plan)
    return self.plan.problem.work

  def choose(self, request: Request, on_progress: OnProgress) -> Choice:
    """Returns the choice that `prepare` would make; loads nothing."""
    self._find_record(on_progress)
    return self._choose(request, False, None)

  def _find_record(self, on_progress: OnProgress) -> None:
    if self._record is not None:
      return
    root = self.weights.root
    try:
      self._record, _ = calibrate.load_or_measure(
        self.machine, root, on_progress
      )
    except InputError:
      if root != self.source.path:
        raise
      # A folder that can only be read is a source, and no disk tier.
      self._record, _ = calibrate.load_or_measure(
        self.machine, None, on_progress
      )

  def _choose(
    self, request: Request, watched: bool, fixed: Mapping[Key, str] | None
  ) -> Choice:
    """Plans, unless that has been done; the work is a new one each time."""
    key = self._key(request, watched, fixed)
    if key not in self._chosen:
      self._chosen[key] = self._planner(self._lossy).choose(
        request, watched=watched, fixed=fixed
      )
    choice = self._chosen[key]
    work = dataclasses.replace(choice.plan.problem.work)
    problem = dataclasses.replace(choice.plan.problem, work=work)
    plan = dataclasses.replace(choice.plan, problem=problem)
    return dataclasses.replace(choice, plan=plan)

  def _key(self, request: Request, watched: bool, fixed) -> Hashable:
    settled = frozenset(fixed.items()) if fixed else None
    return request, watched, settled, self.form, self.policy

  def _fixed(self) -> dict[Key, str]:
    """Where the weights are."""
    assert self.store is not None
    return {k: p for k, p in self.store.places.items() if k[0] == 'weights'}

  def _planner(self, lossy: bool) -> Planner:
    assert self._record is not None
    return Planner(
      self.source.config,
      self.policy,
      [self.form] if self.form else self._forms(lossy),
      self._record,
      Machine(
        unified=self.machine.unified,
        chunk_tokens=self.machine.chunk_tokens,
        budgets=lambda form: self.budgets | {'disk': self._disk_budget(form)},
        disk_flag=self._disk_flag,
      ),
      cache_bits=cache_choices(self.policy, lossy),
      lossy=None if lossy else functools.partial(self._planner, True),
    )

  def _disk_budget(self, form: Format) -> int:
    """Bytes of disk: those that are free, and those that are this model's."""
    assert self._record is not None
    if not self._record.knows_disk:
      return 0
    free = self.weights.disk_budget(form)
    if self.store is None or 'disk' not in self.store.tiers:
      return free
    sizes = self.store.tiers['disk'].sizes
    return free + sum(n for key, n in sizes.items() if key[0] != 'weights')

  def _forms(self, lossy: bool) -> list[Format]:
    """Formats that the weights may have."""
    if self.weights.settled:
      dtypes = [self.weights.settled]
    elif self.machine.platform == 'cpu':
      dtypes = ['float32', 'bfloat16']
    else:
      dtypes = [self.source.config.checkpoint_dtype]
    forms = [self.weights.form(dtype) for dtype in dtypes]
    if lossy and self.policy.weight_bits is None:
      forms += self.weights.lossy_forms(dtypes)
    return forms

  def _load(self, on_progress: OnProgress) -> None:
    try:
      self._fill(on_progress)
    except BaseException:
      self.close()  # else the next use would find half a model
      raise

  def _fill(self, on_progress: OnProgress) -> None:
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
    layers = opt.layers(self.source.config, form.dtype, fused=m.fused)
    codec = Codec(
      self.source.config,
      form.dtype,
      form.packing,
      packing,
      form.rounding,
      self.plan.problem.cache_dtype,
      m.fused,
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
    problem = plan.problem
    size, dtype = config.head_size, jnp.dtype(problem.cache_dtype)
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
