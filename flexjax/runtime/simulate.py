"""Charges the engine's own Actions to a machine that need not be there.

Every link and compute unit is a queue; the dispatching thread is one more.
The rules are the engine's: what is loaded ahead, what waits for what, when
the dispatcher blocks, when memory is given back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexjax.config import MAX_DISK_WRITES
from flexjax.hardware import Hardware
from flexjax.policy.charges import Charges
from flexjax.policy.cost import RESOURCES, run_ahead
from flexjax.policy.placement import TIERS
from flexjax.policy.plan import Plan
from flexjax.runtime.accounts import Accounts
from flexjax.runtime.timeline import Span
from flexjax.schedule.zigzag import ORDERS, Action, Shape, actions
from flexjax.typing import Key

_STEPS = 4  # prefill, a first decode step, and two to see how long one takes
_SETTLING = 1000  # cells, before prefetches and writes of a prefill are through


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """What a block is expected to take.

  Attributes:
    prefill_seconds, decode_seconds: of the whole block.
    tokens: that it generates.
    busy: phase -> resource -> part of the phase in which it is busy.
    peak_bytes: most bytes of each tier, as a run reports them.
    link_bytes: bytes that cross each link.
  """

  prefill_seconds: float
  decode_seconds: float
  tokens: int
  busy: Mapping[str, Mapping[str, float]]
  peak_bytes: Mapping[str, int]
  link_bytes: Mapping[str, int]

  @property
  def seconds(self) -> float:
    return self.prefill_seconds + self.decode_seconds

  @property
  def throughput_tokens_per_s(self) -> float:
    return self.tokens / self.seconds

  def binding(self, phase: str) -> str:
    """Returns the resource that is busiest in a phase."""
    busy = self.busy[phase]
    return max(busy, key=lambda name: busy[name])

  def to_json(self, blocks: int = 1) -> dict[str, Any]:
    """Returns plain numbers, keyed as a run's figures are, of some blocks."""
    fields = dataclasses.asdict(self)
    del fields['tokens']
    for name in ('prefill_seconds', 'decode_seconds'):
      fields[name] *= blocks
    links = fields['link_bytes']
    fields['link_bytes'] = {link: blocks * n for link, n in links.items()}
    fields['throughput_tokens_per_s'] = self.throughput_tokens_per_s
    fields['binding'] = {phase: self.binding(phase) for phase in self.busy}
    return fields


def predict(
  plan: Plan,
  hardware: Hardware,
  *,
  watched: bool = False,
  first: int | None = None,
) -> Prediction:
  """Predicts a block from its first steps: later ones take as long as those.

  Args:
    watched: requests may stop early, so that the tokens of a batch are looked
      at before its next step.
    first: how many steps, at most; by default as many as it takes.
  """
  steps = max(1, plan.problem.work.gen_len)
  if first is None:
    cells = len(plan.problem.layers) * plan.problem.work.num_batches
    first = _STEPS + _SETTLING // cells
  run = Simulator(plan, hardware, watched=watched)
  run.run(min(steps, first))
  return run.prediction(steps)


def timeline(
  plan: Plan, hardware: Hardware, *, watched: bool = False
) -> list[Span]:
  """Returns what is busy when, during a whole block."""
  run = Simulator(plan, hardware, watched=watched, record=True)
  run.run(max(1, plan.problem.work.gen_len))
  assert run.spans is not None
  return run.spans


class Simulator:
  """A machine at work on one block.

  Attributes:
    spans: what was busy when, if `record`.
  """

  def __init__(
    self,
    plan: Plan,
    hardware: Hardware,
    *,
    watched: bool = False,
    record: bool = False,
  ):
    self.hardware, self.watched = hardware, watched
    self.problem, self.policy = plan.problem, plan.policy
    self.places, self.charges = plan.places, Charges(plan.problem, hardware)
    self.accounts = Accounts(plan)
    self.spans: list[Span] | None = [] if record else None
    self._on_host = self.policy.attention == 'host'
    self._sends = not self._on_host and not plan.problem.unified
    self._shared = [self.problem.share and self._shares(i) for i in (0, 1)]
    self._kinds = [kind for kind, _ in self.problem.layers]
    self._rates: dict[tuple[str, bool], tuple[float, float]] = {}
    self._links: dict[tuple[str, float, bool], float] = {}
    self._cache_bytes = plan.problem.cache_bytes
    both = (True, False)  # prefill, decode
    self._row_bytes = {
      (tier, p): self.charges.sent_bytes(tier, p, self._on_host)
      for tier in TIERS
      for p in both
    }
    self._disk_rows = {p: self.charges.disk_rows(p) for p in both}
    self._hidden_bytes = {p: self.charges.hidden_bytes(p) for p in both}
    self._row_seconds = {
      (tier, p): self.charges.write_rows(tier, p, self._on_host)
      for tier in TIERS
      for p in both
    }
    self._cell = Action('', 0, 0, -1)  # what is being charged
    self._contention = hardware.contention
    self._now = 0.0
    self._free = dict.fromkeys(RESOURCES, 0.0)
    self._busy: list[dict[str, float]] = []  # by token step
    self._there: dict[Key, float] = {}  # when a fetched key can be used
    self._read: dict[Key, float] = {}  # when its bytes have left the disk
    self._written: dict[Key, float] = {}  # when its latest write ends
    self._users: dict[int, int] = {}
    self._expanded: set[int] = set()
    self._output = 0.0  # when the latest result is there
    self._running: dict[tuple[int, int, int], float] = {}
    self._tokens: list[tuple[int, int, float]] = []  # i, k, when it is there
    self._token: dict[int, float] = {}  # batch -> when its latest is there
    self._disk_writes: list[float] = []
    self._filled = 0.0

  def _shares(self, i: int) -> bool:
    return i == 0 or self.problem.work.num_batches > 1

  def run(self, steps: int) -> None:
    """Simulates the first `steps` tokens of every batch."""
    work = self.problem.work
    self._steps = steps
    # All decode steps as the mean one, unless each has its turn.
    self._mean = steps < work.gen_len
    self._busy = [dict.fromkeys(RESOURCES, 0.0) for _ in range(steps)]
    shape = Shape(
      steps,
      len(self.problem.layers),
      work.num_batches,
      frozenset(self.problem.cached) if work.cache_len else (),
    )
    for action in actions(
      shape,
      ORDERS[self.policy.schedule](shape),
      depth=self.policy.prefetch_depth,
      overlap=self.policy.overlap,
      run_ahead=run_ahead(self.problem, self.policy),
    ):
      self._cell = action
      getattr(self, '_' + action.kind)(action.i, action.j, action.k)

  def prediction(self, steps: int) -> Prediction:
    """Returns what `steps` tokens take, if later steps are like the last."""
    later = max(0, steps - self._steps)
    seconds = [0.0] * self._steps
    before = 0.0
    for i, _, end in self._tokens:
      seconds[i] += end - before
      before = end
    # Nothing is loaded ahead in the last step: the one before is like most.
    usual = seconds[-2] if self._steps > 2 else seconds[-1]
    decode = sum(seconds[1:]) + later * usual
    work = self.problem.work
    busy = {'prefill': self._part(self._busy[:1], seconds[0], 0)}
    if steps > 1:
      busy['decode'] = self._part(self._busy[1:], decode, later)
    return Prediction(
      prefill_seconds=seconds[0],
      decode_seconds=decode,
      tokens=work.gen_len * work.batch_size * work.num_batches,
      busy=busy,
      peak_bytes=self.accounts.peak,
      link_bytes=self.accounts.link_bytes(later),
    )

  def _part(self, steps, seconds: float, later: int) -> dict[str, float]:
    return {
      name: (sum(s[name] for s in steps) + later * steps[-1][name]) / seconds
      for name in RESOURCES
    }

  # Queues.

  def _on(
    self,
    resource: str,
    ready: float,
    seconds: float,
    name: str = '',
    nbytes: int = 0,
  ) -> float:
    """Does something where and when there is room; returns when it ends."""
    begin = max(ready, self._now, self._free[resource])
    end = begin + seconds
    self._free[resource] = end
    self._busy[self._cell.i][resource] += seconds
    if resource in self._contention:
      self._free['device'] += self._contention[resource] * seconds
    if self.spans is not None and seconds:
      _, i, j, k = self._cell
      args = {'i': i, 'j': j, 'k': k}
      if nbytes:
        args['bytes'] = nbytes
      title = f'{name or self._cell.kind} {i}.{j}.{k}'
      self.spans.append(Span(resource, title, begin, end, args))
    return end

  def _dispatch(self, what: str) -> None:
    self._now = self._on('dispatch', self._now, self.hardware.dispatch[what])

  def _copy(
    self,
    link: str,
    ready: float,
    nbytes: float,
    seconds: float | None = None,
    fresh: bool = False,
  ) -> float:
    """Moves bytes; takes `seconds`, if not what the link takes for them."""
    if seconds is None:
      seconds = self._links.get((link, nbytes, fresh))
    if seconds is None:
      alone = not self.policy.overlap
      seconds = self.hardware.link(link, nbytes, alone=alone, fresh=fresh)
      self._links[link, nbytes, fresh] = seconds
    return self._on(link, ready, seconds, nbytes=round(nbytes))

  def _fetch(self, key: Key, nbytes: float, whole: int) -> None:
    """Starts bringing a key to where it is computed with.

    Args:
      nbytes: bytes that are read; `whole` are those that go to the device.
    """
    place = self.places[key]
    ready = self._written.get(key, 0.0)
    if place == 'disk':
      self._dispatch('read')
      fresh = key[0] != 'weights'
      ready = self._copy('disk_to_host', ready, nbytes, fresh=fresh)
      self._read[key] = ready
    if place != 'device' and not self.problem.unified:
      if place == 'host':
        self._dispatch('read')
      # Its buffer may be one that computes enqueued so far still use.
      ready = max(ready, self._free['device'])
      ready = self._copy('host_to_device', ready, whole)
    self._there[key] = ready

  def _take(self, key: Key) -> float:
    """When a fetched key can be used; disks are waited for by dispatching."""
    self._now = max(self._now, self._read.pop(key, 0.0))
    return self._there[key]

  def _put(self, key: Key, nbytes: int, disk: float | None = None) -> float:
    """Brings a result to its tier; returns when it is there.

    `disk` are the disk's seconds, if not those of its link.
    """
    place, ready = self.places[key], self._output
    if place == 'device':
      return ready
    if place == 'disk' or not self.problem.unified:
      self._dispatch('write')
    if not self.problem.unified:
      ready = self._copy('device_to_host', ready, nbytes)
    if place == 'disk':
      if len(self._disk_writes) == MAX_DISK_WRITES:
        self._now = max(self._now, self._disk_writes.pop(0))
      ready = self._copy('host_to_disk', ready, nbytes, disk)
      self._disk_writes.append(ready)
    return ready

  # One method for every kind of Action.

  def _load_weights(self, i: int, j: int, k: int) -> None:
    for group in self.problem.layers[j][1]:
      users = self._users.get(group, 0)
      if not users:
        size = self.problem.group_bytes[group]
        self._fetch(('weights', group), size, size)
        self.accounts.fetch(i, ('weights', group), size)
      self._users[group] = users + 1

  def _free_weights(self, i: int, j: int, k: int) -> None:
    for group in self.problem.layers[j][1]:
      self._users[group] -= 1
      if group in self._expanded:
        self._expanded.discard(group)
        self.accounts.expand(self._kinds[j], -1)
      if not self._users[group]:
        self.accounts.release(('weights', group))

  def _load_cache(self, i: int, j: int, k: int) -> None:
    work = self.problem.work
    size, key = self._cache_bytes, ('cache', j, k)
    rows = work.prompt_len + i - 1.0
    last = rows
    if self._mean:
      rows = work.prompt_len + (work.gen_len - 2) / 2
      last = work.prompt_len + work.gen_len - 2
    if self._on_host:
      self._there[key] = self._written.get(key, 0.0)
      return
    row = size / work.cache_len
    self._fetch(key, rows * row, size)
    self.accounts.fetch(i, key, size, rows * row, last * row)

  def _load_hidden(self, i: int, j: int, k: int) -> None:
    size, key = self._hidden_bytes[i == 0], ('hidden', k)
    self._fetch(key, size, size)
    self.accounts.fetch(i, key, size)

  def _compute(self, i: int, j: int, k: int) -> None:
    kind, prefill = self._kinds[j], i == 0
    if self.watched and kind == 'embed' and i:
      self._now = max(self._now, self._token[k])
    ready = 0.0
    for group in self.problem.layers[j][1]:
      ready = max(ready, self._take(('weights', group)))
    if kind != 'embed':
      ready = max(ready, self._take(('hidden', k)))
    self._dispatch('compute')
    self._expand(i, j, ready)
    attends = kind == 'attention' and i > 0
    if attends:
      ready = max(ready, self._take(('cache', j, k)))
    seconds, inside = self._seconds(kind, prefill)
    if not self._shared[not prefill]:
      seconds += inside
    if attends and self._on_host:
      self._output = self._attend_on_host(ready, seconds, j, k)
    else:
      self._output = self._on('device', ready, seconds, kind)
    self._running[i, j, k] = self._output
    self.accounts.compute((i, j, k))
    for key in (('cache', j, k), ('hidden', k)):
      self.accounts.release(key)
    if kind == 'head':
      self._finish(i, k)

  def _seconds(self, kind: str, prefill: bool) -> tuple[float, float]:
    """Of a layer function, and of expanding within it."""
    if (kind, prefill) not in self._rates:
      self._rates[kind, prefill] = (
        self.charges.layer(kind, prefill, self._on_host),
        self.charges.expand_in_layer(kind, prefill),
      )
    return self._rates[kind, prefill]

  def _expand(self, i: int, j: int, ready: float) -> None:
    """Expands packed weights for all batches of a visit."""
    group, kind = self.problem.layers[j][1][-1], self._kinds[j]
    if not self._shared[i > 0] or group in self._expanded:
      return
    if seconds := self.charges.expand(kind):
      self._on('device', ready, seconds, 'expand')
      self._expanded.add(group)
      self.accounts.expand(kind, 1)

  def _attend_on_host(self, ready, seconds, j: int, k: int) -> float:
    """Half of the products before it on the device, half after it."""
    query = self.charges.query_bytes()
    near = self._on('device', ready, seconds * 3 / 4, 'project')
    if not self.problem.unified:  # new rows are charged where they are stored
      near = self._copy('device_to_host', near, query)
    near = max(near, self._there['cache', j, k])
    unit = 'device' if self.problem.unified else 'cpu'
    done = self._on(unit, near, self.charges.attend_on_host(), 'attend')
    self.accounts.attended(self._cell.i, query)
    if not self.problem.unified:
      done = self._copy('host_to_device', done, query)
    return self._on('device', done, seconds / 4, 'output')

  def _finish(self, i: int, k: int) -> None:
    self._tokens.append((i, k, self._output))
    self._token[k] = self._output
    if i == 0:
      self._now = max(self._now, self._output)

  def _store_cache(self, i: int, j: int, k: int) -> None:
    if not self.problem.work.cache_len:
      return
    key = ('cache', j, k)
    place = self.places[key]
    nbytes = self._row_bytes[place, i == 0]
    seconds = self._row_seconds[place, i == 0]
    # Copied on the device, before they are sent; else written where they go.
    sends = self._sends and place == 'host' and i == 0
    if place == 'disk' or sends:
      self._output = self._on('device', self._output, seconds, 'write rows')
    ready = self._put(key, nbytes, self._disk_rows[i == 0])
    self.accounts.put(i, key, nbytes)
    if sends:
      self._running[i, j, k] = ready
    elif place != 'disk' and seconds:
      attended = self._on_host and not self.problem.unified
      unit = 'cpu' if attended else 'device'
      ready = self._on(unit, ready, seconds, 'write rows')
    self._written[key] = ready

  def _store_hidden(self, i: int, j: int, k: int) -> None:
    key, nbytes = ('hidden', k), self._hidden_bytes[i == 0]
    self._written[key] = self._put(key, nbytes)
    self.accounts.put(i, key, nbytes)

  def _wait(self, i: int, j: int, k: int) -> None:
    self._now = max(self._now, self._running.pop((i, j, k)))
    self.accounts.wait((i, j, k))
