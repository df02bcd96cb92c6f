"""A policy and its budgets -> a tier for every key, or a refusal in numbers.

Decides before anything is loaded: what each tier would hold at its peak, what
goes as high up as it fits where the user left a split out, and which change
would make an impossible request fit.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flexjax.config import MAX_DISK_WRITES, Policy, Split, format_bytes
from flexjax.errors import InputError
from flexjax.policy import cost
from flexjax.policy.placement import TIERS, achieved, spread, total, window
from flexjax.policy.problem import CLASSES, Problem
from flexjax.typing import Key

_PASSES = ('device', 'host') * 2  # what left the disk frees its buffers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Where everything goes.

  Attributes:
    policy: with every split filled in.
    places: tier of every key.
    peak: most bytes of each tier, with what its allocator cannot make use of.
    placement: achieved fractions, by class and tier.
  """

  problem: Problem
  policy: Policy
  places: Mapping[Key, str]
  peak: Mapping[str, int]
  placement: Mapping[str, Mapping[str, float]]

  @property
  def over(self) -> float:
    """Bytes by which tiers fall short."""
    return sum(
      max(0, self.peak[tier] - self.problem.budgets[tier]) for tier in TIERS
    )

  @property
  def fits(self) -> bool:
    return not self.over


def evaluate(
  problem: Problem, policy: Policy, fixed: Mapping[Key, str] | None = None
) -> Plan:
  """Places every key and adds up each tier's peak; all splits are given.

  `fixed` holds keys whose place is settled already: loaded weights.
  """
  places: dict[Key, str] = {}
  placement = {}
  for name in CLASSES:
    sizes = problem.sizes(name)
    split = getattr(policy, name)
    mine = spread(sizes, split)
    mine |= {key: fixed[key] for key in sizes if fixed and key in fixed}
    places |= mine
    placement[name] = achieved(sizes, mine)
  sizes = {k: n for name in CLASSES for k, n in problem.sizes(name).items()}
  peak = total(sizes, places)
  moving = {'disk'} if problem.unified else {'host', 'disk'}
  peak['device'] += max(
    sum(_in_flight(problem, policy, places, sizes, moving, prefill).values())
    + cost.working_bytes(problem, policy, prefill)
    + (_sending(problem, policy, places, sizes) if prefill else 0)
    for prefill in (True, False)
  )
  written = [
    size
    for name in ('hidden', 'cache')
    for key, size in problem.sizes(name).items()
    if places[key] == 'disk'
  ]
  held_by = 'device' if problem.unified else 'host'
  peak[held_by] += MAX_DISK_WRITES * max(written, default=0)
  if not problem.unified:  # what comes from disk passes through host buffers
    peak['host'] += _buffers(problem, policy, places, sizes)
    if spare := cost.pool_spare(problem, policy):
      peak['host'] += spare * sum(
        size
        for key, size in sizes.items()
        if places[key] == 'host' and key[0] != 'cache'
      )
  return Plan(
    problem=problem,
    policy=policy,
    places=places,
    peak=peak,
    placement=placement,
  )


def _in_flight(
  problem, policy, places, sizes, moving, prefill
) -> dict[str, int]:
  """Most bytes of each class that are loaded ahead of use."""
  cells = cost.cells_held(policy)
  part = 1 if prefill else problem.work.prompt_len

  def moved(key: Key) -> int:
    return sizes.get(key, 0) if places.get(key) in moving else 0

  batches = range(problem.work.num_batches)
  groups = [groups for _, groups in problem.layers]
  flight = {
    # A tied table is held once for the head and the embedding after it.
    'weights': window(
      [
        sum(moved(('weights', g)) for g in mine if g not in before)
        for before, mine in zip([(), *groups], groups, strict=False)
      ],
      cost.visits_held(problem, policy),
    ),
    'hidden': window([moved(('hidden', k)) // part for k in batches], cells),
    'cache': 0,
  }
  if policy.attention != 'host' and not prefill:
    cached = [moved(key) for key in _cells(problem)]
    flight['cache'] = window(cached, cells)
  return flight


def _cells(problem) -> list[Key]:
  """The cache that every cell of a step would have, in their order."""
  layers, batches = len(problem.layers), problem.work.num_batches
  return [('cache', j, k) for j in range(layers) for k in range(batches)]


def _sending(problem, policy, places, sizes) -> int:
  """Device bytes of caches that a prefill sends to host memory."""
  if not cost.sending_bytes(problem, policy):
    return 0
  sent = [
    sizes[key] if places.get(key) == 'host' else 0 for key in _cells(problem)
  ]
  return window(sent, 1 + cost.ahead(policy))


def _buffers(problem, policy, places, sizes) -> int:
  """Bytes of the buffers that reads from disk pass through: of every shape as
  many as are ever under way together, because they are kept for the next."""
  kinds: dict[tuple[str, str], dict[Key, int]] = {}
  for key, place in places.items():
    if place == 'disk':
      kind = str(key[0]), problem.shape_of(key)
      kinds.setdefault(kind, {})[key] = sizes[key]
  total = 0
  for (name, _), only in kinds.items():
    prompts = name == 'hidden'
    flight = _in_flight(problem, policy, places, only, {'disk'}, prompts)
    total += flight[name]
    if name == 'hidden' and problem.work.gen_len > 1:  # one token at a time
      total += flight[name] // problem.work.prompt_len
  return total


def resolve(
  problem: Problem, policy: Policy, fixed: Mapping[Key, str] | None = None
) -> Plan:
  """Fills what the policy leaves open as high up as it fits.

  Raises:
    InputError: nothing fits; says what each tier would need of its budget,
      and the nearest change that fits.
  """
  plan = fill(problem, policy, fixed)
  if plan.fits:
    return plan
  raise InputError(_refusal(plan, policy, fixed))


def can_fit(problem: Problem, policy: Policy) -> bool:
  """Whether it might fit: False where what computing takes, or all there is to
  keep, is too much whatever the splits are. Much quicker than `fill`."""
  anywhere, budgets = _unplaced(policy), problem.budgets
  working = max(
    cost.working_bytes(problem, anywhere, prefill) for prefill in (True, False)
  )
  held = working + sum(sum(problem.sizes(name).values()) for name in CLASSES)
  return working <= budgets['device'] and held <= sum(budgets.values())


def fill(
  problem: Problem, policy: Policy, fixed: Mapping[Key, str] | None = None
) -> Plan:
  """Like `resolve`, but where nothing fits, returns the lowest plan."""
  disk = problem.budgets['disk'] > 0
  bottom = Split(0, 0, 100) if disk else Split(0, 100, 0)
  if policy.attention == 'host':
    policy = dataclasses.replace(policy, cache=Split(0, 100, 0))
  given = {name: getattr(policy, name) for name in CLASSES}
  splits: dict[str, Any] = {n: split or bottom for n, split in given.items()}
  plan = evaluate(problem, dataclasses.replace(policy, **splits), fixed)
  for tier in _PASSES:
    for name in CLASSES:
      if given[name] is not None:
        continue
      for split in _raised(splits[name], tier):
        raised = splits | {name: split}
        better = evaluate(problem, dataclasses.replace(policy, **raised), fixed)
        if better.fits or better.over < plan.over:
          plan, splits[name] = better, split
          break
  return plan


def _raised(split: Split, tier: str) -> Iterator[Split]:
  """Splits with more in `tier`, out of what lies below; highest first."""
  for percent in range(100, 0, -2):
    below = 100.0 - percent
    if tier == 'device' and percent > split.device:
      host = min(split.host, below)
      yield Split(percent, host, below - host)
    elif tier == 'host' and split.disk:
      disk = split.disk * below / 100
      yield Split(split.device, 100 - split.device - disk, disk)


def _unplaced(policy: Policy) -> Policy:
  return dataclasses.replace(policy, weights=None, cache=None, hidden=None)


def _refusal(plan: Plan, policy: Policy, fixed) -> str:
  needs = ', '.join(
    f'{tier} {format_bytes(plan.peak[tier])} of '
    f'{format_bytes(plan.problem.budgets[tier])}'
    + _short(plan.peak[tier] - plan.problem.budgets[tier])
    for tier in TIERS
  )
  return f'does not fit: needs {needs}; {_nearest(plan, policy, fixed)}'


def _short(nbytes: float) -> str:
  return f' (short by {format_bytes(nbytes)})' if nbytes > 0 else ''


def _nearest(plan: Plan, policy: Policy, fixed) -> str:
  """Says the smallest change that fits: splits, then batches, then memory."""
  problem = plan.problem
  given = [getattr(policy, name) for name in CLASSES]
  if not problem.budgets['disk'] and any(s and s.disk for s in given):
    hint = f' ({problem.disk_flag})' if problem.disk_flag else ''
    return f'there is no disk for what is to be on disk{hint}'
  open_policy = _unplaced(policy)
  # Where nothing is given, that is what has just been tried.
  candidates = [policy] if policy == open_policy else [policy, open_policy]
  least = fill(problem, open_policy, fixed) if candidates[1:] else plan
  if least.fits:
    flags = [
      f'--{name}={",".join(f"{p:g}" for p in getattr(least.policy, name))}'
      for name in CLASSES
      if getattr(policy, name) is not None
    ]
    return f'{" ".join(flags)} would fit'
  work = problem.work
  while work.batch_size * work.num_batches > 1:
    if work.num_batches > 1:
      work = dataclasses.replace(work, num_batches=work.num_batches // 2)
    else:
      work = dataclasses.replace(work, batch_size=work.batch_size // 2)
    smaller = dataclasses.replace(problem, work=work)
    if not can_fit(smaller, policy):
      continue
    for candidate in candidates:
      if fill(smaller, candidate, fixed).fits:
        hint = '' if candidate is policy else ' without placement flags'
        return (
          f'--batch_size={work.batch_size} --num_batches={work.num_batches}'
          f'{hint} would fit'
        )
  short = [t for t in TIERS if least.peak[t] > problem.budgets[t]]
  if not problem.budgets['disk'] and problem.disk_flag:
    budgets = {**problem.budgets, 'disk': sum(plan.peak.values())}
    with_disk = dataclasses.replace(problem, budgets=budgets)
    if fill(with_disk, open_policy, fixed).fits:
      return f'a disk ({problem.disk_flag}) would take what memory cannot'
  flag = {
    'device': 'device_memory',
    'host': 'host_memory',
    'disk': 'disk space',
  }
  return 'enough would be ' + ' and '.join(
    f'{format_bytes(least.peak[t])} of {flag[t]}' for t in short
  )
