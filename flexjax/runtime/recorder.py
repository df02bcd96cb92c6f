"""Collects the spans of a run while it runs; see `timeline`.

What is dispatched is handed over here; a watcher thread per track waits until
it is ready, in order of dispatch. So a span ends when its watcher has seen
the end, and begins when all that it waits for was there: the dispatch, the
span before it on its track, and what it reads. Nothing here is waited for by
the run, and arrays are let go as soon as they are ready.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from flexjax.runtime.timeline import MAX_SPANS, TRACKS, Span, named
from flexjax.schedule.zigzag import Action
from flexjax.tiers.base import Pending
from flexjax.typing import Key

# What becomes ready: arrays, a function that waits and may return some, or
# None for what takes no time.
What = Any


@dataclasses.dataclass(slots=True)
class _Mark:
  """When the latest work on a key ended; 0 until then."""

  end: float = 0.0


class _Task(NamedTuple):
  """Stages (track, what) one after another, the first begun after `after`."""

  name: str
  args: Mapping[str, Any]
  stages: Sequence[tuple[str, What]]
  issued: float
  after: Sequence[_Mark]
  mark: _Mark


class Recorder:
  """The spans of one run; `close` it to have them."""

  def __init__(self) -> None:
    self._spans: list[Span] = []
    self._marks: dict[Key, _Mark] = {}
    self._issued = time.perf_counter()  # what is handed over now
    tracks = TRACKS[1:]
    self._queues = {t: queue.SimpleQueue[_Task | None]() for t in tracks}
    self._watchers = {
      t: threading.Thread(target=self._watch, args=(t,), daemon=True)
      for t in tracks
    }
    for watcher in self._watchers.values():
      watcher.start()

  def close(self) -> list[Span]:
    """Waits for what is still watched; returns the spans by their begin."""
    for track in TRACKS[1:]:  # a task goes on to later tracks only
      self._queues[track].put(None)
      self._watchers[track].join()
    return sorted(self._spans, key=lambda span: span.begin)

  def dispatched(self, actions: Iterable[Action]) -> Iterator[Action]:
    """Passes actions on, and records how long each one is executed."""
    for action in actions:
      self._issued = begin = time.perf_counter()
      yield action
      self._issued = end = time.perf_counter()
      args = {'i': action.i, 'j': action.j, 'k': action.k}
      self._add(Span('dispatch', action.kind, begin, end, args))

  def load(
    self,
    key: Key,
    nbytes: int,
    links: Sequence[str],
    pending: Pending,
    moves: bool,
  ) -> None:
    """Watches a read; one that does not move takes no time."""

    def read() -> None:
      pending.result()

    stages: list[tuple[str, What]] = [(link, None) for link in links]
    if moves and len(links) == 1:
      stages = [(links[0], pending.result())]
    elif moves:
      stages = [(links[0], read), (links[1], pending.result)]
    name = named(f'load_{key[0]}', *key[1:])
    self._hand_over(key, name, {'bytes': nbytes}, stages, [key])

  def store(
    self, key: Key, nbytes: int, links: Sequence[str], ends: Sequence[What]
  ) -> None:
    """Watches a write of what was computed last: an end for each link."""
    name = named(f'store_{key[0]}', *key[1:])
    stages = list(zip(links, ends, strict=True))
    self._hand_over(key, name, {'bytes': nbytes}, stages, [('compute',)])

  def expand(self, group: int, value: Mapping[str, Array]) -> None:
    """Watches one call's results, which are ready together, by the least."""
    least = min(value.values(), key=lambda array: array.nbytes)
    args, key = {'group': group}, ('weights', group)
    stages = [('device', least)]
    self._hand_over(key, named('expand', group), args, stages, [key])

  def compute(
    self,
    kind: str,
    i: int,
    j: int,
    k: int,
    groups: Sequence[int],
    out: Array,
    compiled: bool = False,
  ) -> None:
    """Watches a cell's compute, which has read what is filed under it."""
    if compiled:  # the device was idle meanwhile
      self._issued = time.perf_counter()
    after: list[Key] = [('weights', group) for group in groups]
    after += [('hidden', k), ('cache', j, k), ('attended',)]
    args = {'i': i, 'j': j, 'k': k}
    name = named(kind, i, j, k)
    self._hand_over(('compute',), name, args, [('device', out)], after)

  def attend(
    self,
    cell: tuple[int, int, int],
    groups: Sequence[int],
    projected: tuple[Array, Array],
    attended: tuple[Array, Array],
  ) -> None:
    """Watches attention on the CPU before the cell's own compute.

    Args:
      projected, attended: query and result, each where it is computed and
        where it goes.
    """
    i, j, k = cell
    (q, query), (x, result) = projected, attended
    inputs: list[Key] = [('weights', group) for group in groups]
    inputs += [('hidden', k)]
    args = {'i': i, 'j': j, 'k': k}
    for key, what, track, after, sent in (
      (('project',), 'project', 'device', inputs, q),
      (('query',), 'store_query', 'device_to_host', [('project',)], query),
      (('attend',), 'attention', 'cpu', [('query',), ('cache', j, k)], x),
      (('attended',), 'load_attended', 'host_to_device', [('attend',)], result),
    ):
      bytes_sent = {'bytes': sent.nbytes} if '_to_' in track else {}
      name, stages = named(what, i, j, k), [(track, sent)]
      self._hand_over(key, name, args | bytes_sent, stages, after)

  def _hand_over(
    self,
    key: Key,
    name: str,
    args: Mapping[str, Any],
    stages: Sequence[tuple[str, What]],
    after: Sequence[Key],
  ) -> None:
    if len(self._spans) >= MAX_SPANS:
      return
    marks = [self._marks[k] for k in after if k in self._marks]
    self._marks[key] = mark = _Mark()
    task = _Task(name, args, stages, self._issued, marks, mark)
    self._queues[stages[0][0]].put(task)

  def _watch(self, track: str) -> None:
    until = 0.0
    while (task := self._queues[track].get()) is not None:
      until = self._see_through(task, until)
      del task  # else its arrays are held until there is another

  def _see_through(self, task: _Task, until: float) -> float:
    """Waits for a task's first stage, hands the rest on; returns its end."""
    (track, what), *rest = task.stages
    # An error is for its own reader, or an array was donated meanwhile.
    with contextlib.suppress(Exception):
      jax.block_until_ready(what() if callable(what) else what)
    now = time.perf_counter()
    begin = max(task.issued, until, *(mark.end for mark in task.after))
    begin = min(begin, now)
    end = begin if what is None else now
    task.mark.end = end
    self._add(Span(track, task.name, begin, end, task.args))
    if rest:
      onward = task._replace(stages=rest, issued=end, after=())
      self._queues[rest[0][0]].put(onward)
    return end

  def _add(self, span: Span) -> None:
    if len(self._spans) < MAX_SPANS:
      self._spans.append(span)
