"""Chooses how a model runs on a machine: the search proposes, the simulator
ranks.

It knows no weights and no tiers, so that one may plan for models and machines
that one does not have.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

from flexjax.config import ModelConfig, Packing, Policy, Split, Workload
from flexjax.errors import InputError
from flexjax.hardware import Hardware
from flexjax.models import opt
from flexjax.policy.plan import Plan, can_fit, fill, resolve
from flexjax.policy.problem import Problem
from flexjax.policy.search import Request, Variant
from flexjax.quant import kernels, keys
from flexjax.runtime import devices
from flexjax.runtime.formats import Format
from flexjax.runtime.ranking import Ranker
from flexjax.runtime.simulate import Prediction, predict
from flexjax.tiers.base import spec_bytes
from flexjax.typing import Key

_MOST_CELLS = 100_000  # of a step, which takes seconds to simulate
_ATTENTIONS = ('device', 'host')
# Of an accelerator's memory: what its allocator held beyond the plan was 4 %.
_FRAGMENTS = 0.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """What planning knows of a machine beside its speeds.

  Attributes:
    unified: host and device are one memory.
    chunk_tokens: see `Compute`.
    budgets: bytes of each tier, for weights in a format.
    disk_flag: see `Problem`.
  """

  unified: bool
  chunk_tokens: int
  budgets: Callable[[Format], Mapping[str, int]]
  disk_flag: str = '--disk_dir'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """How a model is to run.

  Attributes:
    hardware: the machine that was planned for.
    form: of its weights.
    slowly: what the plan is expected to take on the machine that plans are
      compared on; see `Ranker`.
    runners_up: other plans, best first, with what they take then.
  """

  plan: Plan
  prediction: Prediction
  hardware: Hardware
  form: Format
  slowly: Prediction
  runners_up: tuple[tuple[Plan, Prediction], ...] = ()


class Planner:
  """Plans for a model on a machine.

  Args:
    policy: what is None in it is open, `weight_bits` apart.
    forms: formats that weights may have.
    cache_bits: that the cache may have.
    lossy: makes a planner that may store in 4 bits what this one may not;
      None where it would make no difference. It is for advice.

  Raises:
    InputError: the cache cannot be stored in so many bits, or the record says
      nothing of any format's dtype.
  """

  def __init__(
    self,
    config: ModelConfig,
    policy: Policy,
    forms: Sequence[Format],
    hardware: Hardware,
    machine: Machine,
    *,
    cache_bits: Sequence[int] = (16,),
    lossy: 'Callable[[], Planner] | None' = None,
  ):
    self.config, self.policy, self.hardware = config, policy, hardware
    self.ranker = Ranker(hardware)
    self.machine, self.cache_bits = machine, tuple(cache_bits)
    self._lossy = lossy
    self.forms = [form for form in forms if hardware.knows(form.dtype)]
    if not self.forms:
      hardware.of(hardware.mlp, forms[0].dtype)  # says what it knows

  def choose(
    self,
    request: Request,
    *,
    fixed: Mapping[Key, str] | None = None,
    watched: bool = False,
  ) -> Choice:
    """Returns the fastest plan by the simulator, or one whose block is shorter
    and that is next to as fast.

    Args:
      fixed: keys whose place is settled: weights that are loaded.
      watched: requests may stop early; see `simulate.predict`.

    Raises:
      InputError: nothing fits; says which tier is short by how much. Or there
        are too many batches to plan for.
    """
    try:
      return self._choose(request, fixed, watched)
    except InputError as e:
      if self._lossy is None:
        raise
      with contextlib.suppress(InputError):
        self._lossy()._choose(request, fixed, watched)
        e = InputError(f'{e}; --allow_lossy would fit')
      raise e from None

  def _choose(self, request: Request, fixed, watched: bool) -> Choice:
    self._check(request)
    variants = self._variants(fixed)
    if request.gen_len < 2:  # nothing will be attended to a second time
      near = [v for v in variants if v.policy.attention == 'device']
      variants = near or variants
    ranked = self.ranker.rank(variants, request, fixed, watched)
    if not ranked:
      plan = self._fallback(request, fixed, watched)
      ranked = [self.ranker.simulate(plan, request, watched)]
    chosen = self.ranker.pick(ranked, request, watched)
    # A search with a bound begins with one without, and may find the same.
    others: dict[tuple[Policy, Workload], tuple[Plan, Prediction]] = {}
    for one in ranked:
      key = one.plan.policy, one.plan.problem.work
      others.setdefault(key, (one.plan, one.slowly))
    del others[chosen.plan.policy, chosen.plan.problem.work]
    return Choice(
      plan=chosen.plan,
      prediction=predict(chosen.plan, self.hardware, watched=watched),
      hardware=self.hardware,
      form=self._form(chosen.plan),
      slowly=chosen.slowly,
      runners_up=tuple(others.values()),
    )

  def _check(self, request: Request) -> None:
    layers, _ = _parts(self.config, self.forms[0])
    most = _MOST_CELLS // len(layers)
    if (request.num_batches or 0) > most:
      raise InputError(
        f'num_batches must be at most {most} for {len(layers)} layers, got '
        f'{request.num_batches}'
      )

  def problem(self, form: Format, policy: Policy, work: Workload) -> Problem:
    """Returns what is to be placed, if weights are stored as `form`."""
    config, machine = self.config, self.machine
    layers, group_bytes = _parts(config, form)
    packing = cache_packing(config, form, policy)
    budgets = machine.budgets(form)
    return Problem(
      config=config,
      work=work,
      layers=layers,
      group_bytes=group_bytes,
      dtype=form.dtype,
      cache_dtype=cache_dtype(form.dtype, policy, machine.unified),
      packing=form.packing,
      cache_packing=packing,
      kept=_waves_bytes(config) if packing.packs else 0,
      spare=0 if machine.unified else int(_FRAGMENTS * budgets['device']),
      unified=machine.unified,
      chunk_tokens=machine.chunk_tokens,
      fused=str(packing.bits) in self.hardware.decode_attention
      and kernels.fits(packing, config.head_size),
      budgets=budgets,
      disk_flag=machine.disk_flag,
    )

  def _variants(self, fixed: Mapping[Key, str] | None) -> list[Variant]:
    variants = []
    bits = self.cache_bits
    attentions = (
      (self.policy.attention,) if self.policy.attention else _ATTENTIONS
    )
    for form, cache_bits, attention in itertools.product(
      self.forms, bits, attentions
    ):
      if self._makes_sense(cache_bits, attention):
        policy = dataclasses.replace(
          self.policy,
          weight_bits=form.packing.bits,
          cache_bits=cache_bits,
          attention=attention,
        )
        make = functools.partial(self.problem, form, policy)
        variants.append(Variant(policy, make))
        settled = policy.weights is not None or fixed
        if not settled and self._fit_the_device(form):
          # What the program splits evenly may wait for what trickles in.
          policy = dataclasses.replace(policy, weights=Split(100, 0, 0))
          variants.append(Variant(policy, make))
    return variants

  def _fit_the_device(self, form: Format) -> bool:
    _, group_bytes = _parts(self.config, form)
    return sum(group_bytes) < self.machine.budgets(form)['device']

  def _makes_sense(self, cache_bits: int, attention: str) -> bool:
    if attention == 'host' and cache_bits != 16 and 16 in self.cache_bits:
      return False
    if attention == 'device' or self.policy.attention == 'host':
      return True
    return (
      cache_bits == 16
      and not self.machine.unified
      and bool(self.hardware.host_attention)
      and self.policy.cache in (None, Split(0, 100, 0))
    )

  def _fallback(self, request: Request, fixed, watched: bool) -> Plan:
    """A plan of the smallest block, filled as high up as it fits.

    Raises:
      InputError: there is none.
    """
    if request.max_latency is not None:
      return self._shortest(request, fixed, watched)
    size, batches = request.batch_size or 1, request.num_batches or 1
    work = Workload(
      batch_size=size,
      num_batches=batches,
      prompt_len=request.prompt_len,
      gen_len=request.gen_len,
    )
    lowest: list[tuple[int, Problem, Policy]] = []
    for variant in self._variants(fixed):
      problem, policy = variant.problem(work), variant.policy
      if can_fit(problem, policy):
        plan = fill(problem, policy, fixed)
        if plan.fits:
          return plan
      needs = sum(problem.group_bytes) + problem.cache_bytes
      lowest.append((needs, problem, policy))
    _, problem, policy = min(lowest, key=lambda one: one[0])
    return resolve(problem, policy, fixed)  # refuses, and says why

  def _shortest(self, request: Request, fixed, watched: bool) -> Plan:
    """The plan of the smallest block, if that is short enough.

    Raises:
      InputError: it is not; says how long it takes. Or nothing fits.
    """
    one = dataclasses.replace(
      request,
      max_latency=None,
      batch_size=request.batch_size or 1,
      num_batches=request.num_batches or 1,
    )
    choice = self._choose(one, fixed, watched)
    least = choice.prediction.seconds
    assert request.max_latency is not None
    if least > request.max_latency:
      raise InputError(
        f'no block ends within --max_latency={request.max_latency:g} s; the '
        f'smallest is predicted to take {least:.3g} s'
      )
    return choice.plan

  def _form(self, plan: Plan) -> Format:
    problem = plan.problem
    return next(
      form
      for form in self.forms
      if (form.dtype, form.packing) == (problem.dtype, problem.packing)
    )


@functools.cache
def _parts(config: ModelConfig, form: Format):
  """Layers and the bytes of every weight group."""
  layers = tuple(
    (layer.kind, layer.groups) for layer in opt.layers(config, form.dtype)
  )
  return layers, tuple(spec_bytes(spec) for spec in form.specs(config))


def _waves_bytes(config: ModelConfig) -> int:
  return 4 * config.num_layers * config.hidden_size * keys.TERMS


def cache_choices(policy: Policy, lossy: bool) -> tuple[int, ...]:
  """Returns the bits that a cache may have."""
  if lossy and policy.cache_bits is None:
    return 16, 4
  return (policy.cache_bits or 16,)


def cache_packing(config: ModelConfig, form: Format, policy: Policy) -> Packing:
  """Returns how a policy stores the cache.

  Raises:
    InputError: groups do not divide a head.
  """
  size = policy.group_size or form.packing.group_size
  packing = Packing(policy.cache_bits or 16, size)
  if packing.packs:
    try:
      packing.group(config.head_size)
    except InputError as e:
      raise InputError(
        f'the cache cannot be stored in {packing.bits} bits: {e}'
      ) from None
  return packing


def cache_dtype(dtype: str, policy: Policy, unified: bool) -> str:
  """Returns what a cache is kept in, or expanded to where it is packed: what
  computing is, or float32 where a CPU would be slow to attend to that."""
  on_cpu = unified or policy.attention == 'host'
  return 'float32' if on_cpu and dtype not in devices.ATTENDED else dtype
