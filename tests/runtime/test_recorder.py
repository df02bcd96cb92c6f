"""Spans of what ends when the test says so."""

import threading
import time
import weakref

import jax
import jax.numpy as jnp
import pytest

from flexjax.runtime import recorder as recorder_lib
from flexjax.runtime.recorder import Recorder
from flexjax.schedule.zigzag import Action

UP = ('disk_to_host', 'host_to_device')


class Read:
  """A read that ends when it is told to."""

  def __init__(self, error=None):
    self.done = threading.Event()
    self.error = error

  def result(self):
    self.done.wait()
    if self.error is not None:
      raise self.error
    return {'w': jnp.zeros(2)}

  def release(self, after=()):
    pass


def ended(*reads):
  for read in reads:
    read.done.set()


def of(spans, track):
  return [s for s in spans if s.track == track]


def test_disk_reads_go_on_to_the_device():
  recorder, reads = Recorder(), [Read(), Read()]
  for n, read in enumerate(reads):
    recorder.load(('weights', n), 10 + n, UP, read, moves=True)
  ended(*reads)
  spans = recorder.close()
  for link in UP:
    first, second = of(spans, link)
    assert (first.name, second.name) == ('load_weights 0', 'load_weights 1')
    assert first.begin <= first.end <= second.begin <= second.end
    assert [s.args for s in (first, second)] == [{'bytes': 10}, {'bytes': 11}]
  down, up = spans[0], of(spans, 'host_to_device')[0]
  assert down.end <= up.begin


def test_what_does_not_move_takes_no_time():
  recorder = Recorder()
  recorder.load(('cache', 3, 1), 7, UP[1:], Read(), moves=False)
  (span,) = recorder.close()
  assert span[:2] == ('host_to_device', 'load_cache 3.1')
  assert span.begin == span.end


def test_compute_begins_when_its_weights_are_there():
  recorder, read = Recorder(), Read()
  recorder.load(('weights', 4), 1, UP, read, moves=True)
  ended(read)
  out = jnp.ones(3) + read.result()['w'].sum()
  for watcher in ('disk_to_host', 'host_to_device'):  # they saw the end
    recorder._queues[watcher].put(None)
    recorder._watchers[watcher].join()
  recorder.compute('mlp', 1, 5, 0, (4, 9), out)
  spans = recorder.close()
  (span,) = of(spans, 'device')
  assert span.name == 'mlp 1.5.0'
  assert span.args == {'i': 1, 'j': 5, 'k': 0}
  assert span.begin >= of(spans, 'host_to_device')[0].end


def test_compiling_is_not_computing():
  recorder, out = Recorder(), jnp.ones(3)
  for _ in recorder.dispatched([Action('compute', 0, 1, 0)]):
    compiled = time.perf_counter()
    recorder.compute('mlp', 0, 1, 0, (), out, compiled=True)
  dispatched, computed = recorder.close()
  assert dispatched.begin < compiled <= computed.begin


def test_an_error_ends_its_span_only():
  recorder, bad, good = Recorder(), Read(OSError('gone')), Read()
  for n, read in enumerate((bad, good)):
    recorder.load(('weights', n), 1, UP, read, moves=True)
  ended(bad, good)
  spans = recorder.close()
  assert [len(of(spans, link)) for link in UP] == [2, 2]
  with pytest.raises(OSError, match='gone'):  # still there for its reader
    bad.result()


def test_donated_arrays():
  recorder = Recorder()
  array = jax.jit(lambda: jnp.arange(4.0))()
  array.delete()
  recorder.store(('cache', 1, 0), 16, ('device_to_host',), [[array]])
  recorder.compute('mlp', 0, 1, 0, (), jnp.ones(1))
  assert [s.track for s in recorder.close()] == ['device_to_host', 'device']


def test_arrays_are_let_go():
  recorder = Recorder()
  array = jnp.arange(4.0)
  gone = threading.Event()
  weakref.finalize(array, gone.set)
  recorder.compute('mlp', 0, 1, 0, (), array)
  del array
  assert gone.wait(10)  # though nothing else has come
  recorder.close()


def test_dispatch():
  recorder = Recorder()
  actions = [Action('load_weights', 0, 2, -1), Action('compute', 0, 2, 1)]
  assert list(recorder.dispatched(actions)) == actions
  first, second = recorder.close()
  assert first[:2] == ('dispatch', 'load_weights')
  assert second.args == {'i': 0, 'j': 2, 'k': 1}
  assert first.begin <= first.end <= second.begin <= second.end


def test_it_stops_when_there_are_too_many(monkeypatch):
  monkeypatch.setattr(recorder_lib, 'MAX_SPANS', 3)
  recorder = Recorder()
  actions = [Action('compute', 0, 2, k) for k in range(5)]
  for action in recorder.dispatched(actions):
    recorder.compute('mlp', *action[1:], (), jnp.ones(1))
  assert len(recorder.close()) == 3
