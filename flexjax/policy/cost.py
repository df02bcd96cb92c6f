"""What a policy costs: bytes per tier and seconds per resource, affine in the
fractions of weights, cache and hidden states on each tier.

A step keeps every link and every compute unit busy for so long; with overlap
it takes as long as the busiest of them (FlexGen, section 4.3), without as long
as all together. Whoever optimises obtains coefficients by evaluating these.
"""

import functools
from collections import Counter
from collections.abc import Mapping

from flexjax.config import MAX_DISK_WRITES, Policy
from flexjax.hardware import LINKS
from flexjax.policy import volume
from flexjax.policy.charges import Charges
from flexjax.policy.placement import TIERS, window
from flexjax.policy.problem import CLASSES, Problem

_FAR_AHEAD = 16
_widest = functools.lru_cache(window)  # the same for all blocks and fractions
RESOURCES = ('dispatch', *LINKS, 'device', 'cpu')
Shares = Mapping[str, Mapping[str, float]]
"""Fraction of every class, 'weights', 'cache' and 'hidden', on every tier."""

# Of what crosses for other layers meanwhile: all of it would be, were nothing
# loaded ahead; simulated plans are between.
_IN_THE_WAY = 0.5


def ahead(policy: Policy) -> int:
  """Visits, or cells, that are loaded before they are computed; and computes
  that are dispatched before one is waited for."""
  return policy.prefetch_depth if policy.overlap else 0


def run_ahead(problem: Problem, policy: Policy) -> int:
  """Computes of decode steps that are dispatched before one is waited for.

  What they hold is a token's hidden states, if nothing is loaded for them and
  they share no expanded weights; then there may be many, for a host thread
  that is woken late.
  """
  splits = (policy.weights, policy.cache, policy.hidden)
  loads = any(split is None or split.device < 100 for split in splits)
  shares = problem.share and problem.packing.packs
  if loads or (shares and problem.work.num_batches > 1) or not policy.overlap:
    return ahead(policy)
  return max(ahead(policy), _FAR_AHEAD)


def cells_held(policy: Policy) -> int:
  """Cells whose cache and hidden states are on the device at a time: loaded,
  computing, and not known to be done."""
  return 2 * ahead(policy) + 1


def visits_held(problem: Problem, policy: Policy) -> int:
  """Layer visits whose weights are on the device at a time, likewise."""
  return 1 + ahead(policy) + _visits_running(problem, policy)


def _visits_running(problem: Problem, policy: Policy) -> int:
  """Visits that the computes before the current one may reach back to."""
  batches = 1 if policy.schedule == 'row' else problem.work.num_batches
  return -(-ahead(policy) // batches)


def working_bytes(problem: Problem, policy: Policy, prefill: bool) -> int:
  """Device bytes that no key has: computes, their results, expanded weights.

  Results, and new cache rows on their way, are those of computes that have not
  been waited for.
  """
  work = problem.work
  hidden = volume.hidden_bytes(problem.config, work, problem.itemsize)
  rows = 2 * hidden if work.cache_len else 0
  if not prefill:
    hidden, rows = hidden // work.prompt_len, rows // work.prompt_len
  workspace = volume.workspace(
    problem.config,
    work,
    problem.itemsize,
    problem.cache_packing,
    cache_itemsize=problem.cache_itemsize,
    chunk_tokens=problem.chunk_tokens,
    prefill=prefill,
    fused=problem.fused,
  )
  running = ahead(policy) if prefill else run_ahead(problem, policy)
  writing = _attending(running, work.num_batches)
  visits = 1 + _visits_running(problem, policy) if problem.share else 1
  return (
    running * hidden
    + writing * rows
    + workspace
    + _widest(problem.expanded_bytes, visits)
    + problem.kept
    + problem.spare
  )


def _attending(cells: int, batches: int) -> int:
  """Most cells of attention among consecutive ones: as many of the MLP follow
  those of a layer."""
  rounds, rest = divmod(cells, 2 * batches)
  return rounds * batches + min(rest, batches)


def peak_bytes(
  problem: Problem, policy: Policy, shares: Shares, prefill: bool
) -> dict[str, float]:
  """Most bytes of each tier in a phase.

  Per class: fraction x bytes of all keys, and on the device the widest window
  of loads ahead of use x the fraction that must be loaded. Placement in whole
  keys may need more by a key of each class.
  """
  peak = dict.fromkeys(TIERS, 0.0)
  peak['device'] = working_bytes(problem, policy, prefill)
  for name in CLASSES:
    whole, moving = _whole(problem, name), 0
    share = shares[name]
    for tier in TIERS:
      peak[tier] += share[tier] * whole
    if name != 'cache':
      peak['host'] += pool_spare(problem, policy) * share['host'] * whole
    if name != 'cache' or (policy.attention != 'host' and not prefill):
      moving = _in_flight(problem, policy, name, prefill)
    far = share['disk'] + (0 if problem.unified else share['host'])
    peak['device'] += moving * far
    if name == 'cache' and prefill:
      peak['device'] += sending_bytes(problem, policy) * share['host']
    if not problem.unified:  # what comes from disk passes through buffers
      peak['host'] += moving * share['disk']
  held_by = 'device' if problem.unified else 'host'
  writes = MAX_DISK_WRITES * problem.cache_bytes
  peak[held_by] += writes * shares['cache']['disk']
  return peak


def pool_spare(problem: Problem, policy: Policy) -> int:
  """Bytes that XLA's pool of pinned memory may take for each that it holds,
  beside that.

  It grows by regions that double: 49 GiB of weights took 66 (H200). A limit
  keeps it within the budget, but what a CPU attends to lies outside.
  """
  attended = policy.attention == 'host' and problem.work.cache_len > 0
  return int(attended and not problem.unified)


def sending_bytes(problem: Problem, policy: Policy) -> int:
  """Device bytes of caches that a prefill sends to host memory, if all are to
  go there: those of computes that have not been waited for."""
  if problem.unified or policy.attention == 'host':
    return 0
  if not problem.work.cache_len:
    return 0
  cells = 1 + ahead(policy)
  return _attending(cells, problem.work.num_batches) * problem.cache_bytes


def _whole(problem: Problem, name: str) -> int:
  """Bytes of all keys of a class."""
  batches = problem.work.num_batches
  if name == 'weights':
    return sum(problem.group_bytes)
  if name == 'cache':
    return batches * len(problem.cached) * problem.cache_bytes
  return batches * volume.hidden_bytes(
    problem.config, problem.work, problem.itemsize
  )


def _in_flight(
  problem: Problem, policy: Policy, name: str, prefill: bool
) -> int:
  """Bytes of the widest window of a class, if all of it must be loaded."""
  cells, batches = cells_held(policy), problem.work.num_batches
  if name == 'weights':
    return _widest(problem.layer_bytes, visits_held(problem, policy))
  if name == 'cache':
    return _attending(cells, batches) * problem.cache_bytes
  size = volume.hidden_bytes(problem.config, problem.work, problem.itemsize)
  return min(cells, batches) * (
    size if prefill else size // problem.work.prompt_len
  )


def step_seconds(
  charges: Charges, policy: Policy, shares: Shares, prefill: bool
) -> dict[str, float]:
  """Seconds for which a token step keeps each of RESOURCES busy.

  A decode step is the mean one: caches on disk are read as far as they are
  filled.
  """
  busy = dict(_compute(charges, policy, prefill))
  _weights(busy, charges, policy, shares['weights'])
  if charges.problem.work.cache_len:
    _cache(busy, charges, policy, shares['cache'], prefill)
  _hidden(busy, charges, shares['hidden'], prefill)
  for link, part in charges.hardware.contention.items():
    busy['device'] += part * busy[link]
  if policy.attention == 'host' and not prefill and not charges.problem.unified:
    # A device works in order: what follows waits for the CPU, and what the CPU
    # hands back for the weights of other layers that are on their way.
    busy['cpu'] += busy['device']
    if charges.problem.work.num_batches > 1:
      busy['cpu'] += _IN_THE_WAY * busy['host_to_device']
  return busy


@functools.lru_cache(maxsize=4)  # of the same charges at many fractions
def _compute(
  charges: Charges, policy: Policy, prefill: bool
) -> dict[str, float]:
  """Every layer for every batch; packed weights are expanded once a visit
  where batches share them."""
  busy = dict.fromkeys(RESOURCES, 0.0)
  problem, batches = charges.problem, charges.problem.work.num_batches
  on_host = policy.attention == 'host'
  shared = problem.share and (prefill or batches > 1)
  visits = batches if policy.schedule == 'row' else 1
  for kind in ('embed', 'attention', 'mlp', 'head'):
    seconds = batches * charges.layer(kind, prefill, on_host)
    if shared:
      seconds += visits * charges.expand(kind)
    else:
      seconds += batches * charges.expand_in_layer(kind, prefill)
    busy['device'] += problem.kinds[kind] * seconds
  cells = len(problem.layers) * batches
  busy['dispatch'] += cells * charges.hardware.dispatch['compute']
  return busy


def _weights(busy, charges: Charges, policy: Policy, share) -> None:
  """Every group off the device crosses once a visit."""
  problem = charges.problem
  visits = problem.work.num_batches if policy.schedule == 'row' else 1
  for size, count in Counter(problem.group_bytes).items():
    _read(busy, charges, share, size, count * visits, fresh=False)


def _cache(busy, charges: Charges, policy: Policy, share, prefill) -> None:
  """Every layer's cache is read whole in decode (from disk: as far as it is
  filled), and gets new rows."""
  problem, work = charges.problem, charges.problem.work
  hardware = charges.hardware
  cells = len(problem.cached) * work.num_batches
  on_host = policy.attention == 'host'
  filled = work.prompt_len + (work.gen_len - 2) / 2
  if not prefill and on_host:
    unit = 'device' if problem.unified else 'cpu'
    busy[unit] += cells * charges.attend_on_host()
    query = 0 if problem.unified else charges.query_bytes()
    busy['device_to_host'] += cells * hardware.link('device_to_host', query)
    busy['host_to_device'] += cells * hardware.link('host_to_device', query)
  elif not prefill:
    part = filled / work.cache_len
    _read(busy, charges, share, problem.cache_bytes, cells, part)
  for tier in ('host', 'disk'):
    alone = {'host': 0.0, 'disk': 0.0, tier: share[tier]}
    size = charges.sent_bytes(tier, prefill, on_host)
    _write(busy, charges, alone, size, cells, charges.disk_rows(prefill))
  for tier in TIERS:
    seconds = charges.write_rows(tier, prefill, on_host)
    seconds *= cells * share[tier]
    attended = on_host and not problem.unified
    busy['cpu' if attended else 'device'] += seconds


def _hidden(busy, charges: Charges, share, prefill: bool) -> None:
  """Hidden states go out after every layer but the last, and come back."""
  problem = charges.problem
  cells = (len(problem.layers) - 1) * problem.work.num_batches
  size = charges.hidden_bytes(prefill)
  _read(busy, charges, share, size, cells)
  _write(busy, charges, share, size, cells)


def _read(
  busy, charges: Charges, share, size, times, of_disk=1.0, fresh=True
) -> None:
  """Adds reads of a key: `of_disk` is the part that is read from disk, `fresh`
  whether the run itself has written it."""
  hardware, far = charges.hardware, share['disk']
  disk = hardware.link('disk_to_host', size * of_disk, fresh=fresh)
  busy['disk_to_host'] += times * share['disk'] * disk
  if not charges.problem.unified:
    far += share['host']
    up = hardware.link('host_to_device', size)
    busy['host_to_device'] += times * far * up
  busy['dispatch'] += times * far * hardware.dispatch['read']


def _write(busy, charges: Charges, share, size, times, disk=None) -> None:
  """Adds writes of `size` bytes; `disk` are the disk's seconds, if not those
  of its link."""
  hardware, far = charges.hardware, share['disk']
  if disk is None:
    disk = hardware.link('host_to_disk', size)
  busy['host_to_disk'] += times * share['disk'] * disk
  if not charges.problem.unified:
    far += share['host']
    down = hardware.link('device_to_host', size)
    busy['device_to_host'] += times * far * down
  busy['dispatch'] += times * far * hardware.dispatch['write']
