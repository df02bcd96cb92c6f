"""The fastest policy that fits: a linear program inside a small search.

Batch size, number of batches, formats and the place of attention are tried
out; for each, where tensors live is a linear program (FlexGen, section 4.3),
whose matrix is what `cost` says at the corners. Fractions become places for
whole keys, and what those need is checked again.
"""

import dataclasses
import math
from collections.abc import (
  Callable,
  Hashable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linprog

from flexjax.config import Policy, Split, Workload
from flexjax.hardware import Hardware
from flexjax.policy import cost
from flexjax.policy.charges import Charges
from flexjax.policy.placement import TIERS
from flexjax.policy.plan import Plan, evaluate
from flexjax.policy.problem import CLASSES, Problem
from flexjax.typing import Key

_SIZES = tuple(2**n for n in range(11))
_BATCHES = (1, 2, 4, 8, 16, 32)
_FINER = (2 / 3, 3 / 4, 5 / 4, 3 / 2)
_FINEST = (7 / 8, 15 / 16, 17 / 16, 9 / 8)
_REFINED_EACH = 2  # of every variant's
_REFINED = 6  # of the best guesses, whose neighbourhood is looked at
_TRIES = 6  # to place fractions in whole keys
_TASTE = 1e-4  # how much a higher tier is liked where time does not decide
# Of the time that resources are busy beside the busiest: what is hidden in
# theory is not in a run, where one thing waits for another.
_HIDDEN = 0.03
_HIGHEST = {'device': 1.0, 'host': 0.0, 'disk': 0.0}
_VARIABLES = tuple((name, tier) for name in CLASSES for tier in TIERS)
_EXACT = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked for.

  Attributes:
    prompts: how many there are; None for as many as one likes.
    batch_size, num_batches: None where the search may choose.
    max_latency: seconds that a block may take; None for any.
  """

  prompt_len: int
  gen_len: int
  prompts: int | None = None
  batch_size: int | None = None
  num_batches: int | None = None
  max_latency: float | None = None

  def clamped(self) -> 'Request':
    """Returns the same with no larger block than there are prompts."""
    size, batches = self.batch_size, self.num_batches
    if self.prompts is None:
      return self
    if size is not None:
      size = min(size, self.prompts)
    if batches is not None:
      batches = min(batches, math.ceil(self.prompts / (size or 1)))
    return dataclasses.replace(self, batch_size=size, num_batches=batches)

  def rate(self, work: Workload, seconds: float) -> float:
    """Returns prompts per second, if a block takes `seconds`."""
    block = work.batch_size * work.num_batches
    if self.prompts is None:
      return block / seconds
    return self.prompts / (seconds * math.ceil(self.prompts / block))


class Variant(NamedTuple):
  """A choice of formats and attention: its policy, and problems of it."""

  policy: Policy
  problem: Callable[[Workload], Problem]


class Guess(NamedTuple):
  """What the linear program says of a choice.

  Attributes:
    rate: prompts per second, if every phase took no longer than its busiest
      resource.
    seconds: of a block.
  """

  rate: float
  seconds: float
  variant: Variant
  problem: Problem
  shares: cost.Shares

  @property
  def policy(self) -> Policy:
    """The variant's, its splits filled in."""
    given = self.variant.policy
    splits: dict[str, Any] = {
      name: getattr(given, name) or _split(self.shares[name])
      for name in CLASSES
    }
    return dataclasses.replace(given, **splits)

  @property
  def format(self) -> Hashable:
    """How numbers are stored, and where attention is computed."""
    bare: dict[str, Any] = dict.fromkeys(CLASSES)
    return dataclasses.replace(self.variant.policy, **bare), self.problem.dtype

  @property
  def kind(self) -> Hashable:
    """What guesses share that are wrong alike: format, and tiers in use."""
    used = (at for at in _VARIABLES if self.shares[at[0]][at[1]] > _EXACT)
    return self.format, frozenset(used)


def search(
  variants: Sequence[Variant],
  request: Request,
  hardware: Hardware,
  *,
  fixed: Mapping[Key, str] | None = None,
) -> list[Guess]:
  """Returns what may be fast, the most promising first; `place` makes plans.

  Looks at a coarse grid of blocks, then around the best of them.

  Args:
    fixed: keys whose place is settled: weights that are loaded.
  """
  seen: dict[tuple[int, int, int], Guess | None] = {}
  known: set[Hashable] = set()  # variants may come to the same

  def look(n: int, size: int, batches: int) -> None:
    if (n, size, batches) in seen:
      return
    variant = variants[n]
    work = Workload(
      batch_size=size,
      num_batches=batches,
      prompt_len=request.prompt_len,
      gen_len=request.gen_len,
    )
    problem = variant.problem(work)
    settled = _settled(problem, variant.policy, fixed)
    found = solve(
      problem,
      variant.policy,
      hardware,
      max_latency=request.max_latency,
      settled=settled,
    )
    seen[n, size, batches] = None
    if found is not None:
      shares, seconds = found
      rate = request.rate(work, seconds)
      guess = Guess(rate, seconds, variant, problem, shares)
      if (made := (size, batches, problem.dtype, guess.policy)) not in known:
        known.add(made)
        seen[n, size, batches] = guess

  for n in range(len(variants)):
    for size, batches in _blocks(request):
      look(n, size, batches)
  for parts in (_FINER, _FINER, _FINEST):
    for n, size, batches in _best(seen):
      for near in _around(request, size, batches, parts):
        look(n, *near)
  found = [guess for guess in seen.values() if guess is not None]
  return sorted(found, key=lambda guess: -guess.rate)


def _best(seen: Mapping[tuple[int, int, int], Guess | None]):
  """Where to look closer: the best of all, and of every variant."""
  found = {where: guess for where, guess in seen.items() if guess}
  ranked = sorted(found, key=lambda where: -found[where].rate)
  chosen = dict.fromkeys(ranked[:_REFINED])
  for n in dict.fromkeys(where[0] for where in ranked):
    mine = [where for where in ranked if where[0] == n]
    chosen |= dict.fromkeys(mine[:_REFINED_EACH])
  return chosen


def _blocks(request: Request) -> Iterator[tuple[int, int]]:
  """A coarse grid of batch sizes and numbers of batches."""
  most = request.prompts or math.inf
  for batches in _given(request.num_batches, _BATCHES):
    sizes: Iterable[int] = _SIZES
    if request.prompts is not None:  # blocks that waste no place
      even = (math.ceil(request.prompts / (batches * n)) for n in (1, 2, 3, 4))
      sizes = sorted({*_SIZES, *(s for s in even if s <= _SIZES[-1])})
    for size in _given(request.batch_size, sizes):
      if size * (batches - 1) < most and (
        size <= most or request.batch_size is not None
      ):
        yield size, batches


def _around(
  request: Request, size: int, batches: int, parts: Sequence[float]
) -> Iterator[tuple[int, int]]:
  most = request.prompts or math.inf
  sizes = {max(1, round(size * part)) for part in parts}
  numbers = {max(1, round(batches * part)) for part in parts}
  numbers |= {batches - 1, batches + 1} - {0}
  if request.batch_size is None:
    for near in sizes:
      if near * (batches - 1) < most:
        yield min(near, int(min(most, 2 * _SIZES[-1]))), batches
  for near in _given(request.num_batches, numbers):
    if size * (near - 1) < most:
      yield size, near


def _given(value: int | None, choices: Iterable[int]) -> Iterable[int]:
  return choices if value is None else (value,)


def _settled(
  problem: Problem, policy: Policy, fixed: Mapping[Key, str] | None
) -> cost.Shares:
  """Fractions that are not the program's to choose."""
  settled: dict[str, dict[str, float]] = {}
  for name in CLASSES:
    split = getattr(policy, name)
    sizes = problem.sizes(name) if name == 'weights' and fixed else {}
    if any(key in (fixed or {}) for key in sizes):
      whole = sum(sizes.values())
      settled[name] = dict.fromkeys(TIERS, 0.0)
      for key, size in sizes.items():
        settled[name][(fixed or {})[key]] += size / whole
    elif split is not None:
      parts = zip(TIERS, split, strict=True)
      settled[name] = {tier: part / 100 for tier, part in parts}
  if policy.attention == 'host' and 'cache' not in settled:
    settled['cache'] = {'device': 0.0, 'host': 1.0, 'disk': 0.0}
  return settled


def solve(
  problem: Problem,
  policy: Policy,
  hardware: Hardware,
  *,
  max_latency: float | None = None,
  settled: cost.Shares | None = None,
  budgets: Mapping[str, float] | None = None,
) -> tuple[cost.Shares, float] | None:
  """Solves the linear program of one choice.

  Minimises the seconds of a block, prefill + (n - 1) decode steps, subject to
  each phase taking as long as its busiest resource, the bytes of each tier,
  and `max_latency`. Time being about equal, less work of all resources is
  preferred, then higher tiers.

  Args:
    settled: classes whose fractions are given.
    budgets: bytes of each tier, if not the problem's.

  Returns:
    The fractions of every class, and the seconds of a block; None where
    nothing fits.
  """
  charges = Charges(problem, hardware)
  steps = max(0, problem.work.gen_len - 1)
  limits = budgets or problem.budgets
  highest = {name: (settled or {}).get(name, _HIGHEST) for name in CLASSES}
  takes = _seconds(charges, policy, highest, limits)
  if takes is not None and takes <= (max_latency or math.inf):
    # The least: nothing crosses a link that need not. (Were rows written faster
    # into a host cache than into a device's, it would not be; none are.)
    return highest, takes
  count = len(_VARIABLES)
  rows: list[np.ndarray] = []
  bounds: list[float] = []
  hidden = np.zeros(count)

  def at_most(coefficients: np.ndarray, times: Sequence[float], bound) -> None:
    rows.append(np.concatenate([coefficients, times]))
    bounds.append(bound)

  for phase, prefill in enumerate((True, False)):
    if not prefill and not steps:
      continue
    mine = [0.0, 0.0]
    mine[phase] = -1.0

    def seconds(shares, prefill=prefill):
      busy = cost.step_seconds(charges, policy, shares, prefill)
      return list(busy.values()) if policy.overlap else [sum(busy.values())]

    def nbytes(shares, prefill=prefill):
      return list(cost.peak_bytes(problem, policy, shares, prefill).values())

    matrix, constant = _linear(seconds)
    for coefficients, fixed_part in zip(matrix, constant, strict=True):
      at_most(coefficients, mine, -fixed_part)
    hidden += _HIDDEN * (1 if prefill else steps) * matrix.sum(axis=0)
    matrix, constant = _linear(nbytes)
    for c, fixed_part, tier in zip(matrix, constant, TIERS, strict=True):
      at_most(c / 2**30, [0.0, 0.0], (limits[tier] - fixed_part) / 2**30)
  if max_latency is not None:
    at_most(np.zeros(count), [1.0, steps], max_latency)
  worst = max(-b for b in bounds if b <= 0) if any(b < 0 for b in bounds) else 1
  taste = np.array(
    [_TASTE * worst * TIERS.index(tier) for _, tier in _VARIABLES]
  )
  equal = np.zeros((len(CLASSES), count + 2))
  for row, name in enumerate(CLASSES):
    equal[row, [n for n, (c, _) in enumerate(_VARIABLES) if c == name]] = 1
  ranges = [
    _range(problem, name, tier, settled or {}) for name, tier in _VARIABLES
  ]
  result = linprog(
    [*(taste + hidden), 1.0, steps],
    A_ub=np.array(rows),
    b_ub=bounds,
    A_eq=equal,
    b_eq=np.ones(len(CLASSES)),
    bounds=[*ranges, (0, None), (0, None)],
    method='highs',
  )
  if result.status != 0:
    return None
  x = result.x
  shares = {name: dict.fromkeys(TIERS, 0.0) for name in CLASSES}
  for (name, tier), value in zip(_VARIABLES, x, strict=False):
    shares[name][tier] = float(min(max(value, 0.0), 1.0))
  return shares, float(x[-2] + steps * x[-1])


def _seconds(
  charges: Charges,
  policy: Policy,
  shares: cost.Shares,
  limits: Mapping[str, float],
) -> float | None:
  """Seconds of a block by some fractions; None if they do not fit."""
  seconds = 0.0
  steps = max(0, charges.problem.work.gen_len - 1)
  for prefill, times in ((True, 1), (False, steps)):
    if not times:
      continue
    peak = cost.peak_bytes(charges.problem, policy, shares, prefill)
    if any(peak[tier] > limits[tier] for tier in TIERS):
      return None
    busy = cost.step_seconds(charges, policy, shares, prefill).values()
    seconds += times * (max(busy) if policy.overlap else sum(busy))
  return seconds


def _range(problem, name, tier, settled) -> tuple[float, float]:
  if name in settled:
    share = settled[name][tier]
    return share, share
  return 0.0, 1.0 if problem.budgets[tier] else 0.0


def _linear(
  function: Callable[[cost.Shares], list[float]],
) -> tuple[np.ndarray, np.ndarray]:
  """Coefficients and constants of affine functions of the fractions."""
  none = {name: dict.fromkeys(TIERS, 0.0) for name in CLASSES}
  constant = np.array(function(none))
  columns = []
  for name, tier in _VARIABLES:
    corner = {**none, name: {**none[name], tier: 1.0}}
    columns.append(np.array(function(corner)) - constant)
  return np.array(columns).T, constant


def place(
  guess: Guess,
  hardware: Hardware,
  max_latency: float | None = None,
  fixed: Mapping[Key, str] | None = None,
) -> Plan | None:
  """Turns fractions into places of whole keys, and checks that they fit.

  Where they do not, the program is solved again with less of the tiers that
  fell short.
  """
  problem, variant = guess.problem, guess.variant
  budgets, less = dict(problem.budgets), dict.fromkeys(TIERS, 0)
  settled = _settled(problem, variant.policy, fixed)
  for _ in range(_TRIES):
    plan = evaluate(problem, guess.policy, fixed)
    if plan.fits:
      return plan
    for tier in TIERS:
      over = plan.peak[tier] - problem.budgets[tier]
      if over > 0:  # twice as much each time: a key may be far larger
        less[tier] = max(2 * less[tier], int(over * 1.02) + 1)
        budgets[tier] -= less[tier]
    found = solve(
      problem,
      variant.policy,
      hardware,
      max_latency=max_latency,
      settled=settled,
      budgets=budgets,
    )
    if found is None:
      return None
    shares, _ = found
    guess = guess._replace(shares=shares)
  return None


def _split(share: Mapping[str, float]) -> Split:
  """Percentages in tenths; what rounding takes goes to the lowest tier."""
  tenths = {
    tier: math.floor(1000 * part + _EXACT) for tier, part in share.items()
  }
  lowest = [tier for tier in TIERS if share[tier] > _EXACT][-1]
  tenths[lowest] += 1000 - sum(tenths.values())
  return Split(*(tenths[tier] / 10 for tier in TIERS))
