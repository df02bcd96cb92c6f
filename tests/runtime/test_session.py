"""What a run does to the process it runs in."""

import gc
import weakref

import jax
import pytest

import flexjax

PARAMS = flexjax.SamplingParams(max_new_tokens=3)


def test_full_collections_wait_for_the_end_of_a_block(llm):
  before, within = gc.get_threshold(), []

  def on_progress(what, done, total):
    if what == 'generate' and done < total:
      within.append(gc.get_threshold())

  llm.on_progress = on_progress
  llm.generate(['one', 'two'], PARAMS)
  assert within
  for threshold in within:
    assert threshold[:2] == before[:2]
    assert threshold[2] > 1e6
  assert gc.get_threshold() == before


def test_the_collector_is_itself_again_after_a_failure(llm):
  def fail(what, done, total):
    if what == 'generate':
      raise KeyboardInterrupt

  before, llm.on_progress = gc.get_threshold(), fail
  with pytest.raises(KeyboardInterrupt):
    llm.generate(['one'], PARAMS)
  assert gc.get_threshold() == before


def test_scoring_leaves_nothing_behind(llm):
  llm.on_progress = lambda *args: None
  texts = [[2, 30, 40, 50]] * 4
  llm.score(texts, top=5)
  gc.collect()
  gc.disable()  # cycles would stay
  try:
    before = len(jax.live_arrays())
    for _ in range(20):
      llm.score(texts, top=5)
    assert len(jax.live_arrays()) <= before + 20
  finally:
    gc.enable()


def test_garbage_of_a_caller_is_collected(llm):
  class Thing:
    pass

  llm.on_progress = lambda *args: None
  things = []
  for _ in range(150):
    thing = Thing()
    thing.self, thing.load = thing, [[] for _ in range(1000)]
    things.append(weakref.ref(thing))
    del thing
    llm.generate([[5, 6]], flexjax.SamplingParams(max_new_tokens=1))
  assert sum(ref() is not None for ref in things) < 100
