"""When things happen: the block schedule as an iterator of Actions.

An order says in which sequence the cells (i, j, k) are visited: token step i,
layer j, batch k (FlexGen, section 4.1). `actions` turns any order into loads,
computes and stores: loads run ahead along the traversal itself, so that the
wrap-around cases of the paper's algorithm 1 need no code. Whoever executes
the Actions, charges them or counts them knows nothing of orders.
"""

import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple


class Action(NamedTuple):
  """One thing to do for cell (i, j, k).

  Kinds: load_weights, free_weights (k is -1: they serve the whole visit),
  load_cache, load_hidden, compute, store_cache, store_hidden, skip (drop what
  was loaded for a batch that ended meanwhile), wait (until the cell's compute
  is done: it bounds how far the dispatcher runs ahead).
  """

  kind: str
  i: int
  j: int
  k: int


class Visit(NamedTuple):
  """Consecutive cells (i, j, k) for k in `batches`: weights are read once."""

  i: int
  j: int
  batches: tuple[int, ...]


class Shape(NamedTuple):
  """A block: `steps` tokens, `layers` layers, `batches` batches.

  `cached` holds the layers that keep a KV cache.
  """

  steps: int
  layers: int
  batches: int
  cached: Container[int] = ()


def zigzag(shape: Shape) -> Iterator[Visit]:
  """FlexGen's block schedule: all batches pass a layer before the next."""
  batches = tuple(range(shape.batches))
  for i in range(shape.steps):
    for j in range(shape.layers):
      yield Visit(i, j, batches)


def row(shape: Shape) -> Iterator[Visit]:
  """The usual order: a batch ends before the next one begins."""
  for k in range(shape.batches):
    for i in range(shape.steps):
      for j in range(shape.layers):
        yield Visit(i, j, (k,))


ORDERS: dict[str, Callable[[Shape], Iterator[Visit]]] = {
  'zigzag': zigzag,
  'row': row,
}


def actions(
  shape: Shape,
  visits: Iterable[Visit],
  *,
  depth: int,
  overlap: bool = True,
  run_ahead: int = 0,
  wanted: Callable[[int, int, bool], bool] = lambda i, k, now: True,
) -> Iterator[Action]:
  """Yields what to do, in the order of doing it.

  Args:
    shape: the block.
    visits: its cells in order of computation, from `ORDERS`.
    depth: weights are loaded so many visits ahead of their use, cache and
      hidden states so many cells ahead, as soon as they have been stored.
    overlap: False loads each thing just before its use and waits for every
      compute.
    run_ahead: computes of decode steps that are dispatched before one is waited
      for; `depth`, if that is more, as in prefills.
    wanted: whether batch k still wants token i. Asked when a cell comes into
      sight and again, with `now` true, when its turn has come: batches may
      end meanwhile.

  Loads are always issued before the compute that hides them.
  """
  ahead = depth if overlap else 0
  return _Lookahead(shape, ahead, max(ahead, run_ahead), wanted).run(visits)


class _Lookahead:
  """The state of `actions`: what is in sight, asked for, and done."""

  def __init__(self, shape: Shape, ahead: int, run_ahead: int, wanted):
    self.shape, self.ahead, self.wanted = shape, ahead, wanted
    self.run_ahead = run_ahead
    self.sight: deque[Visit] = deque()  # weights asked for, not yet used
    self.cells: deque[tuple[int, int, int]] = deque()  # theirs, in order
    self.done: dict[int, int] = {}  # batch -> cells it has behind it
    self.asked: set[tuple[str, int, int, int]] = set()
    self.running: deque[tuple[int, int, int]] = deque()

  def run(self, visits: Iterable[Visit]) -> Iterator[Action]:
    for visit in visits:
      if self._come_into_sight(visit):
        yield Action('load_weights', visit.i, visit.j, -1)
        if len(self.sight) > self.ahead:
          yield from self._use(self.sight.popleft())
    while self.sight:
      yield from self._use(self.sight.popleft())

  def _come_into_sight(self, visit: Visit) -> bool:
    """Takes the visit's live batches in; False where there are none."""
    batches = tuple(k for k in visit.batches if self.wanted(visit.i, k, False))
    if batches:
      self.sight.append(visit._replace(batches=batches))
      self.cells.extend((visit.i, visit.j, k) for k in batches)
    return bool(batches)

  def _use(self, visit: Visit) -> Iterator[Action]:
    i, j = visit.i, visit.j
    for k in visit.batches:
      ordinal = i * self.shape.layers + j
      if not self.wanted(i, k, True):
        self.cells.popleft()
        yield Action('skip', i, j, k)
        continue
      yield from self._load_ahead()
      self.cells.popleft()
      yield Action('compute', i, j, k)
      if j in self.shape.cached and self.shape.steps > 1:
        yield Action('store_cache', i, j, k)
      if j < self.shape.layers - 1:
        yield Action('store_hidden', i, j, k)
      self.done[k] = ordinal + 1
      self.running.append((i, j, k))
      while len(self.running) > (self.run_ahead if i else self.ahead):
        yield Action('wait', *self.running.popleft())
    yield Action('free_weights', i, j, -1)

  def _load_ahead(self) -> Iterator[Action]:
    """Asks for what the next cells read, the current one's included."""
    for cell in itertools.islice(self.cells, self.ahead + 1):
      for kind in ('load_cache', 'load_hidden'):
        if (kind, *cell) not in self.asked and self._stored(kind, *cell):
          self.asked.add((kind, *cell))
          yield Action(kind, *cell)
    for kind in ('load_cache', 'load_hidden'):
      self.asked.discard((kind, *self.cells[0]))

  def _stored(self, kind: str, i: int, j: int, k: int) -> bool:
    """Whether the cell reads such a thing and it has been written."""
    done = self.done.get(k, 0)
    ordinal = i * self.shape.layers + j
    if kind == 'load_hidden':
      return j > 0 and done == ordinal
    return (
      j in self.shape.cached and i > 0 and done > ordinal - self.shape.layers
    )
