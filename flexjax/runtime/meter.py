"""Counts what crosses every link, and how long something was crossing.

A watcher thread waits for queued copies in their order, so that measuring
them costs the dispatching thread nothing.
"""

import queue
import threading
import time
from typing import Any

import jax

from flexjax.hardware import LINKS


class Meter:
  """Bytes per link, and the time in which a copy was under way.

  Attributes:
    link_bytes: bytes that crossed each of `LINKS`.
  """

  def __init__(self) -> None:
    self.link_bytes = dict.fromkeys(LINKS, 0)
    self._busy_seconds = 0.0
    self._until = 0.0
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._watcher = threading.Thread(target=self._watch, daemon=True)
    self._watcher.start()

  def crossed(self, *links: str, nbytes: int) -> None:
    for link in links:
      self.link_bytes[link] += nbytes

  def watch(self, arrays: Any) -> None:
    """Counts the time from now until `arrays` have arrived as busy."""
    self._queue.put((time.perf_counter(), arrays))

  @property
  def busy_seconds(self) -> float:
    """Seconds in which at least one watched copy was under way."""
    done = threading.Event()
    self._queue.put((done, None))
    done.wait()
    return self._busy_seconds

  def close(self) -> None:
    self._queue.put((None, None))
    self._watcher.join()

  def _watch(self) -> None:
    while True:
      began, arrays = self._queue.get()
      if began is None:
        return
      if isinstance(began, threading.Event):
        began.set()
        continue
      try:
        jax.block_until_ready(arrays() if callable(arrays) else arrays)
      except Exception:  # its own reader raises it; here it only ends
        continue
      now = time.perf_counter()
      self._busy_seconds += now - max(began, min(self._until, now))
      self._until = now
      del arrays
