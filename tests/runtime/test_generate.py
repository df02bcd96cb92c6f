"""Requests followed row by row; no model."""

import numpy as np

from flexjax.config import SamplingParams
from flexjax.data.blocks import Block
from flexjax.runtime.generate import Progress, Request


def make_progress(lengths, resize, worth):
  """A block of one batch with a request per length."""
  requests = [
    Request(n, SamplingParams(max_new_tokens=m, ignore_eos=True), 2, str)
    for n, m in enumerate(lengths)
  ]
  size = len(lengths)
  block = Block(
    np.zeros((1, size, 4), np.int32),
    np.zeros((1, size), np.int32),
    np.arange(size, dtype=np.int32)[None],
  )
  return Progress(block, requests, resize, worth)


def test_a_batch_never_shrinks_in_the_middle_of_a_token():
  answers = iter([False, True, True, True])
  shrunk = []
  progress = make_progress(
    (2, 2, 2, 9),
    lambda i, k, keep: shrunk.append((i, keep.tolist())),
    lambda k, size, steps: next(answers),
  )
  for i in range(4):
    for _ in range(6):  # layers; the answer changes after the first
      progress.wanted(i, 0, True)
  assert shrunk == [(3, [3])]
