"""Where the tensors of one choice live: a linear program.

FlexGen, section 4.3; its matrix is what `cost` says at the corners.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import linprog

from flexjax.config import Policy
from flexjax.hardware import Hardware
from flexjax.policy import cost
from flexjax.policy.charges import Charges
from flexjax.policy.placement import TIERS
from flexjax.policy.problem import CLASSES, Problem

_TASTE = 1e-4  # how much a higher tier is liked where time does not decide
# Of the time that resources are busy beside the busiest: what is hidden in
# theory is not in a run, where one thing waits for another.
_HIDDEN = 0.03
_HIGHEST = {'device': 1.0, 'host': 0.0, 'disk': 0.0}
_VARIABLES = tuple((name, tier) for name in CLASSES for tier in TIERS)


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
