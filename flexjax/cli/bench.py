"""flexjax bench: how fast a model runs on random token ids.

  flexjax bench --model=opt-1.3b --random_weights --prompt_len=512 --gen_len=32

Runs one block after a warm-up that compiles, and prints the same figures as
generate. Every request gets all of its tokens.
"""

import numpy as np
from absl import flags

from flexjax.cli import flags as shared
from flexjax.cli import report
from flexjax.config import SamplingParams
from flexjax.errors import InputError

FLAGS = flags.FLAGS


def define() -> None:
  shared.define_policy()
  report.define()
  report.define_trace()
  flags.DEFINE_integer('prompt_len', 512, 'Tokens in every prompt.')
  flags.DEFINE_integer('gen_len', 32, 'Tokens to generate for every prompt.')
  flags.DEFINE_integer(
    'num_prompts', None, 'Prompts. Default: one block of them.'
  )
  flags.DEFINE_integer('repeats', 1, 'Runs after the warm-up; the last counts.')


def run() -> None:
  for name in ('prompt_len', 'gen_len', 'num_prompts', 'repeats'):
    value = FLAGS[name].value
    if value is not None and value < 1:
      raise InputError(f'{name} must be at least 1, got {value}')
  shared.check_files('stats', 'trace')
  with shared.open_model() as llm, report.progress(llm):
    count = FLAGS.num_prompts or llm.block_size(FLAGS.prompt_len, FLAGS.gen_len)
    rng = np.random.default_rng(0)
    size = (count, FLAGS.prompt_len)
    ids = rng.integers(4, llm.config.vocab_size, size).tolist()
    params = SamplingParams(max_new_tokens=FLAGS.gen_len, ignore_eos=True)
    llm.warm_up(ids, params)
    for n in range(FLAGS.repeats):
      llm.record = bool(FLAGS.trace) and n == FLAGS.repeats - 1
      llm.generate(ids, params)
  report.write_trace(llm)
  report.show(llm)
