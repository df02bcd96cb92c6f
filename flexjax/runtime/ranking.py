"""Which of the search's guesses are simulated, in which order, and their rank.

The search is quick and knows nothing of waits; the simulator knows them and
takes a while. What it says of a few plans is held against the rest.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from flexjax.hardware import Hardware
from flexjax.policy.plan import Plan
from flexjax.policy.search import Guess, Request, Variant, place, search
from flexjax.runtime.simulate import Prediction, predict
from flexjax.typing import Key

# How much longer dispatching is taken to last when plans are compared: records
# of H200s say 75 to 155 us a cell, whose runs then took 110 to 290.
CAUTION = 2.5
_ALIKE = 0.99  # of the best rate: then the shorter block is taken
_HOPELESS = 0.9  # of the best rate: what promises less is not simulated
_RANKED = 14  # plans that are simulated, at most
_RANKED_BY = 2  # steps of them: the prefill and a decode step
# Where the CPU attends, a first decode step waits for what the prefill left.
_RANKED_BY_ON_HOST = 4
_CELLS = 50_000  # of them together, beyond which no more are simulated
_TRIES = 4  # to find a block that is short enough
_LESS = 0.98  # of what is missing, because whole keys are not fractions
_MORE = 1.05  # of the bound: the search may promise too little, too
_SURE = 0.9  # of the bound: what takes no longer by its first steps is short


class Ranked(NamedTuple):
  """A plan that was simulated.

  Attributes:
    rate: prompts per second on the cautious machine, by `slowly`.
    seconds: of a block: on the machine itself where these decide whether it is
      short enough, else as `slowly` has them.
    slowly: a block on the cautious machine, by its first steps.
    promised: the seconds that the search promised; of what it did not find, 0.
  """

  rate: float
  seconds: float
  slowly: Prediction
  plan: Plan
  promised: float = 0.0


class Ranker:
  """Ranks plans of one planner.

  Attributes:
    cautious: the machine that plans are compared on, whose dispatching takes
      `CAUTION` times as long: a processor has other things to do as well,
      and a plan that has little to dispatch loses nothing by that.
  """

  def __init__(self, hardware: Hardware):
    self._hardware = hardware
    self.cautious = dataclasses.replace(
      hardware,
      dispatch={what: CAUTION * t for what, t in hardware.dispatch.items()},
    )
    self._unbounded: dict[Hashable, list[Ranked]] = {}

  def rank(
    self,
    variants: Sequence[Variant],
    request: Request,
    fixed: Mapping[Key, str] | None,
    watched: bool,
  ) -> list[Ranked]:
    """Returns the plans that the search finds, as far as the simulator finds
    them short enough, best first; none where nothing fits, or nothing is short
    enough.

    Where seconds are bounded, what is best without a bound may do; that is
    found once for all bounds. The search takes links and computing for
    perfectly overlapped, so that a block may take longer than it says: then it
    is asked for shorter ones.

    Args:
      variants: the same ones whenever `fixed` is the same.
    """
    most = request.max_latency
    free = dataclasses.replace(request, max_latency=None)
    key = free, frozenset((fixed or {}).items()), watched
    if key not in self._unbounded:
      found = self._simulate_some(variants, free, math.inf, fixed, watched)
      self._unbounded[key] = sorted(found, key=lambda one: -one.rate)
    found = self._unbounded[key]
    if most is None or not found:
      return list(found)
    kept = [one for one in found if one.seconds <= _SURE * most]
    best = found[0].plan
    if predict(best, self._hardware, watched=watched).seconds <= most:
      return found[:1] + [one for one in kept if one.plan is not best]
    bound = _MORE * most
    for _ in range(_TRIES):
      asked = dataclasses.replace(request, max_latency=bound)
      found = self._simulate_some(variants, asked, most, fixed, watched)
      kept += [one for one in found if one.seconds <= most]
      rate = max((one.rate for one in kept), default=0.0)
      over = [
        one.promised * most / one.seconds
        for one in found
        if one.seconds > most and one.rate > rate
      ]
      if not over:
        break
      bound = _LESS * min(bound, max(over))
    return sorted(kept, key=lambda one: -one.rate)

  def simulate(
    self, plan: Plan, request: Request, watched: bool, most: float = math.inf
  ) -> Ranked:
    """Simulates a plan: on the cautious machine, and on the machine itself if
    it may take more than `most` seconds there."""
    slowly = _soon(plan, self.cautious, watched)
    seconds = slowly.seconds
    if seconds > _SURE * most:
      seconds = predict(plan, self._hardware, watched=watched).seconds
    rate = request.rate(plan.problem.work, slowly.seconds)
    return Ranked(rate, seconds, slowly, plan)

  def pick(
    self, ranked: Sequence[Ranked], request: Request, watched: bool
  ) -> Ranked:
    """Returns the best one of what `rank` returns.

    Of plans that are alike on the cautious machine, where many are once
    dispatching binds, the fastest on the machine itself; of those that are
    alike there, too, the one with the shortest block.
    """
    alike = [one for one in ranked if one.rate >= _ALIKE * ranked[0].rate]
    if len(alike) == 1:
      return alike[0]
    rates = [
      request.rate(
        one.plan.problem.work, _soon(one.plan, self._hardware, watched).seconds
      )
      for one in alike
    ]
    least = _ALIKE * max(rates)
    fast = [
      one for one, rate in zip(alike, rates, strict=True) if rate >= least
    ]
    return min(fast, key=lambda one: one.slowly.seconds)

  def _simulate_some(
    self,
    variants: Sequence[Variant],
    request: Request,
    most: float,
    fixed: Mapping[Key, str] | None,
    watched: bool,
  ) -> list[Ranked]:
    """Simulates what promises most, corrected by what was learnt meanwhile, and
    one of every format first; as long as it promises nine tenths of the best
    that takes at most `most` seconds, and there are not too many."""
    bounded = request.max_latency is not None
    hardware = self._hardware if bounded else self.cautious
    guesses: Sequence[Guess] = search(variants, request, hardware, fixed=fixed)
    ranked: list[Ranked] = []
    learnt, best, cells = _Learnt(), 0.0, 0
    tried: set[Hashable] = set()
    while len(ranked) < _RANKED and cells < _CELLS:
      promised = [(learnt.promise(guess), guess) for guess in guesses]
      promised = [one for one in promised if one[0] >= _HOPELESS * best]
      if not promised:
        break
      _, guess = max(
        promised, key=lambda one: (one[1].format not in tried, one[0])
      )
      guesses = [other for _, other in promised if other is not guess]
      tried.add(guess.format)
      plan = place(guess, hardware, request.max_latency, fixed)
      if plan is None:
        continue
      one = self.simulate(plan, request, watched, most)
      one = one._replace(promised=guess.seconds)
      ranked.append(one)
      learnt.add(guess, one.rate)
      if one.seconds <= most:
        best = max(best, one.rate)
      layers, batches = plan.problem.layers, plan.problem.work.num_batches
      cells += _steps(plan) * len(layers) * batches
    return ranked


def _soon(plan: Plan, hardware: Hardware, watched: bool) -> Prediction:
  """A block by its first steps."""
  return predict(plan, hardware, watched=watched, first=_steps(plan))


def _steps(plan: Plan) -> int:
  on_host = plan.policy.attention == 'host'
  return _RANKED_BY_ON_HOST if on_host else _RANKED_BY


class _Learnt:
  """Corrects what guesses promise by how others of their kind fell short.

  A block half or twice as large in batches, or in their number, is expected to
  fall short half as much as the nearest one that is known.
  """

  def __init__(self) -> None:
    self._short: dict[Hashable, list[tuple[float, float, float]]] = {}

  def promise(self, guess: Guess) -> float:
    """Returns the prompts per second that are to be expected, at best."""
    known = self._short.get(guess.kind)
    if not known:
      return guess.rate
    size, batches = self._at(guess)
    distance, short = min(
      (abs(size - s) + abs(batches - b), short) for s, b, short in known
    )
    return guess.rate * (1 - short * 2**-distance)

  def add(self, guess: Guess, rate: float) -> None:
    """Takes in what the simulator says of a guess's plan."""
    at = (*self._at(guess), 1 - rate / guess.rate)
    self._short.setdefault(guess.kind, []).append(at)

  @staticmethod
  def _at(guess: Guess) -> tuple[float, float]:
    work = guess.problem.work
    return math.log2(work.batch_size), math.log2(work.num_batches)
