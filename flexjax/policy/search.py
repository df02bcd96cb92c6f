"""Which choices are tried: batch size, number of batches, format, attention.

For each of them `program` says where tensors live, in fractions. These become
places for whole keys, and what those need is checked again.
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

from flexjax.config import Policy, Split, Workload
from flexjax.hardware import Hardware
from flexjax.policy import cost
from flexjax.policy.placement import TIERS
from flexjax.policy.plan import Plan, evaluate
from flexjax.policy.problem import CLASSES, Problem
from flexjax.policy.program import solve
from flexjax.typing import Key

_SIZES = tuple(2**n for n in range(11))
_BATCHES = (1, 2, 4, 8, 16, 32)
_MOST_BATCHES = 4 * _BATCHES[-1]
_FINER = (2 / 3, 3 / 4, 5 / 4, 3 / 2)
_FINEST = (7 / 8, 15 / 16, 17 / 16, 9 / 8)
_COUNTS = (1, 2, 3, 4)  # of blocks that prompts are divided among evenly
_ROOMY = 1.03  # places for each prompt, at most, of even blocks
_MANY = 32  # blocks, of which one more or less makes no difference
_REFINED_EACH = 2  # of every variant's
_REFINED = 6  # of the best guesses, whose neighbourhood is looked at
_TRIES = 6  # to place fractions in whole keys
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
    used = frozenset(
      (name, tier)
      for name, share in self.shares.items()
      for tier, part in share.items()
      if part > _EXACT
    )
    return self.format, used


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
  if request.prompts is not None:
    for n, size, batches in _best(seen):
      count = math.ceil(request.prompts / (size * batches))
      if count <= _MANY:
        counts = range(max(1, count - 1), count + 2)
        for even in _even(request, request.prompts, counts):
          look(n, *even)
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
  for batches in _given(request.num_batches, _BATCHES):
    for size in _given(request.batch_size, _SIZES):
      yield _within(request, size, batches)
  if request.prompts is not None:
    yield from _even(request, request.prompts, _COUNTS)


def _even(
  request: Request, prompts: int, counts: Iterable[int]
) -> Iterator[tuple[int, int]]:
  """Blocks of which so many take all prompts and waste next to no place: there
  are few for any number of prompts, and of those few may fit."""
  given = (request.batch_size, request.num_batches) != (None, None)
  for count in counts:
    rows = math.ceil(prompts / count)
    numbers: Iterable[int] = range(1, _BATCHES[-1] + 1)
    if request.batch_size is not None:
      numbers = (math.ceil(rows / request.batch_size),)
    for batches in _given(request.num_batches, numbers):
      size = request.batch_size or math.ceil(rows / batches)
      small = size <= _SIZES[-1] and batches <= _MOST_BATCHES
      if small and (given or size * batches <= _ROOMY * rows):
        yield _within(request, size, batches)


def _around(
  request: Request, size: int, batches: int, parts: Sequence[float]
) -> Iterator[tuple[int, int]]:
  sizes = {max(1, round(size * part)) for part in parts}
  numbers = {max(1, round(batches * part)) for part in parts}
  numbers |= {batches - 1, batches + 1} - {0}
  if request.batch_size is None:
    for near in sizes:
      yield _within(request, min(near, 2 * _SIZES[-1]), batches)
  for near in _given(request.num_batches, numbers):
    yield _within(request, size, near)


def _within(request: Request, size: int, batches: int) -> tuple[int, int]:
  """The smallest block of which no more are needed for all prompts; where both
  numbers are given, they are kept."""
  if request.prompts is not None:
    count = math.ceil(request.prompts / (size * batches))
    rows = math.ceil(request.prompts / count)
    if request.batch_size is None:
      size = math.ceil(rows / batches)
    if None in (request.batch_size, request.num_batches):
      batches = math.ceil(rows / size)
  return size, batches


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
