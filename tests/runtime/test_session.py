"""What a run does to the process it runs in."""

import gc

import pytest

import flexjax

PARAMS = flexjax.SamplingParams(max_new_tokens=3)


def test_the_collector_looks_away_while_a_block_runs_and_no_longer(llm):
  counts = []

  def on_progress(what, done, total):
    if what == 'generate' and done < total:
      counts.append(gc.get_freeze_count())

  llm.on_progress = on_progress
  llm.generate(['one', 'two'], PARAMS)
  assert counts
  assert all(counts)
  assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_so(llm):
  gc.freeze()
  try:
    llm.generate(['one'], PARAMS)
    assert gc.get_freeze_count() > 0
  finally:
    gc.unfreeze()


def test_the_collector_is_itself_again_after_a_failure(llm):
  def fail(what, done, total):
    if what == 'generate':
      raise KeyboardInterrupt

  llm.on_progress = fail
  with pytest.raises(KeyboardInterrupt):
    llm.generate(['one'], PARAMS)
  assert gc.get_freeze_count() == 0
