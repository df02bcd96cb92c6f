"""The bytes that store and engine would report of a block, without any.

Memory counts from when a read is dispatched until the compute that used it is
waited for, so that peaks need no clock: what is counted here is what a run
counts.
"""

from flexjax.config import MAX_DISK_WRITES
from flexjax.hardware import LINKS
from flexjax.policy import volume
from flexjax.policy.placement import total
from flexjax.policy.plan import Plan
from flexjax.policy.problem import CLASSES
from flexjax.typing import Key

Cell = tuple[int, int, int]


class Accounts:
  """Bytes per tier and per link, by token step.

  Attributes:
    peak: most bytes of each tier so far.
  """

  def __init__(self, plan: Plan):
    self.problem, self.places = plan.problem, plan.places
    sizes = {k: n for c in CLASSES for k, n in self.problem.sizes(c).items()}
    self.peak = total(sizes, self.places)
    self.peak['device'] += self.problem.kept
    self._device: float = self.peak['device']
    self._host = self.peak['host']
    self._lent: dict[Key, tuple[float, int]] = {}  # bytes, and of the key
    self._steps: list[dict[str, float]] = []
    # Buffers that reads from disk pass through are kept for the next of
    # their shape; on one memory they are what was read.
    self._buffers: dict[tuple[str, int], tuple[int, int]] = {}
    self._writes: list[float] = []
    self._running: set[Cell] = set()
    self._latest: Cell = (0, 0, 0)
    self._due: dict[Cell, float] = {}  # bytes free once it is done

  def fetch(
    self, i: int, key: Key, size: int, nbytes: float = 0, most: float = 0
  ) -> None:
    """A key of `size` bytes starts on its way to the device.

    Args:
      nbytes: that cross, where not all do: on the average of all steps;
        `most` in the last of them.
    """
    place = self.places[key]
    if place == 'device':
      return
    if place == 'host':
      nbytes = most = size
    nbytes, most = nbytes or size, most or size
    self._cross(i, 'host_to_device', nbytes)
    if place == 'disk':
      self._cross(i, 'disk_to_host', nbytes)
      self._buffer((self.problem.shape_of(key), size), 1)
    elif self.problem.unified:
      return
    self._lent[key] = (most, size)
    self._borrow(most)

  def release(self, key: Key) -> None:
    """What was fetched has been used."""
    if key not in self._lent:
      return
    nbytes, size = self._lent.pop(key)
    self._free_when_done(nbytes)
    if self.places[key] == 'disk':
      self._buffer((self.problem.shape_of(key), size), -1)

  def put(self, i: int, key: Key, nbytes: float) -> None:
    """A result goes to its tier."""
    place = self.places[key]
    if place != 'device':
      self._cross(i, 'device_to_host', nbytes)
    if place == 'disk':
      self._cross(i, 'host_to_disk', nbytes)
      self._writes = [*self._writes, nbytes][-MAX_DISK_WRITES:]
      self._count_host()

  def attended(self, i: int, nbytes: float) -> None:
    """Queries went to the CPU and attended values came back."""
    self._cross(i, 'device_to_host', nbytes)
    self._cross(i, 'host_to_device', nbytes)

  def expand(self, kind: str, sign: int) -> None:
    """A layer's packed matrices are there expanded, or no longer."""
    p = self.problem
    nbytes = volume.expanded_bytes(p.config, kind, p.packing, p.itemsize)
    if sign > 0:
      self._borrow(nbytes)
    else:
      self._free_when_done(nbytes)

  def compute(self, cell: Cell) -> None:
    """A cell is dispatched; what is released next, it has used."""
    self._running.add(cell)
    self._latest = cell

  def wait(self, cell: Cell) -> None:
    """A cell is done."""
    self._running.discard(cell)
    self._borrow(-self._due.pop(cell, 0))

  def _free_when_done(self, nbytes: float) -> None:
    if self._latest in self._running:
      self._due[self._latest] = self._due.get(self._latest, 0) + nbytes
    else:
      self._borrow(-nbytes)

  def link_bytes(self, later: int) -> dict[str, int]:
    """Bytes per link, if `later` more steps are like the last."""
    steps = self._steps + self._steps[-1:] * later
    return {link: round(sum(step[link] for step in steps)) for link in LINKS}

  def _cross(self, i: int, link: str, nbytes: float) -> None:
    while len(self._steps) <= i:
      self._steps.append(dict.fromkeys(LINKS, 0.0))
    self._steps[i][link] += nbytes

  def _borrow(self, nbytes: float) -> None:
    self._device += nbytes
    self.peak['device'] = max(self.peak['device'], round(self._device))

  def _buffer(self, kind: tuple[str, int], change: int) -> None:
    held, most = self._buffers.get(kind, (0, 0))
    self._buffers[kind] = held + change, max(most, held + change)
    if held + change > most:
      self._host += kind[1]
      self._count_host()

  def _count_host(self) -> None:
    if self.problem.unified:
      return
    held = self._host + sum(self._writes)
    self.peak['host'] = max(self.peak['host'], round(held))
