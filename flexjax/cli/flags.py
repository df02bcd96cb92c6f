"""Flags that several commands share, and what they make of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from flexjax.cli import files
from flexjax.config import Policy, SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.llm import LLM, load

FLAGS = flags.FLAGS

_LOAD = (
  'model', 'dtype', 'weights', 'cache', 'hidden', 'batch_size', 'num_batches',
  'schedule', 'prefetch_depth', 'overlap', 'attention', 'weight_bits',
  'cache_bits', 'group_size', 'rounding', 'device_memory', 'host_memory',
  'disk_dir', 'random_weights', 'weights_seed', 'allow_lossy', 'max_latency',
  'hardware',
)  # fmt: skip


def define_model() -> None:
  """Defines the flags that name a model and its disk tier."""
  flags.DEFINE_string(
    'model',
    None,
    'Checkpoint directory, folder that convert has written, or hub id; with '
    '--random_weights also a preset such as opt-1.3b. Default: the small model '
    'that ships with flexjax.',
  )
  flags.DEFINE_string(
    'dtype',
    'auto',
    "float32, bfloat16, float16 or auto: the checkpoint's on an accelerator, "
    'on a CPU the fastest that fits.',
  )
  flags.DEFINE_string(
    'disk_dir', None, 'Directory of the disk tier. Default: no disk tier.'
  )
  flags.DEFINE_string(
    'weight_bits',
    None,
    "Bits of each number of the layers' matrices: 16, 8, 4 or auto. Default: "
    'what a converted folder holds, else 16 (4 where that is faster and '
    '--allow_lossy is given).',
  )
  flags.DEFINE_integer(
    'group_size',
    None,
    'Numbers that share a scale and a minimum at 8 or 4 bits: 32, 64 or 128. '
    'Default: what a converted folder holds, else 64.',
  )
  flags.DEFINE_string(
    'rounding',
    None,
    'How a group of weights gets its range: search (of the least squared '
    "error) or minmax (the numbers' own). Default: as above, else search.",
  )
  flags.DEFINE_bool(
    'random_weights', False, 'Draw the weights instead of reading them.'
  )
  flags.DEFINE_integer('weights_seed', 0, 'Seed of --random_weights.')


def define_policy() -> None:
  """Defines the flags that say how a block runs."""
  define_model()
  for name, what in (
    ('weights', 'weights'),
    ('cache', 'KV cache'),
    ('hidden', 'hidden states'),
  ):
    flags.DEFINE_string(
      name,
      None,
      f'Percentages of the {what} on device, host and disk, such as 20,80,0. '
      'Default: what the planner finds fastest.',
    )
  flags.DEFINE_integer(
    'batch_size',
    None,
    'Prompts per batch, at most. Default: what the planner finds fastest.',
  )
  flags.DEFINE_integer(
    'num_batches',
    None,
    'Batches per block, at most. Default: what the planner finds fastest.',
  )
  flags.DEFINE_string(
    'schedule',
    Policy.schedule,
    "zigzag (a block's batches share each load of weights) or row (one batch "
    'after another).',
  )
  flags.DEFINE_integer(
    'prefetch_depth',
    Policy.prefetch_depth,
    'How many layers ahead weights are loaded, and how many batches ahead '
    'cache and hidden states.',
  )
  flags.DEFINE_bool(
    'overlap', Policy.overlap, 'Load and store while computing.'
  )
  flags.DEFINE_string(
    'attention',
    None,
    'Where decode attention reads the cache: device, or host (on the CPU, '
    'beside a cache in host memory). Default: what the planner finds fastest.',
  )
  flags.DEFINE_string(
    'cache_bits',
    None,
    'Bits of each number of the KV cache: 16, 8, 4 or auto. Default: 16 (4 '
    'where that is faster and --allow_lossy is given).',
  )
  flags.DEFINE_bool(
    'allow_lossy',
    False,
    'Let the planner store weights and cache in 4 bits; tokens may differ.',
  )
  flags.DEFINE_float(
    'max_latency',
    None,
    'Seconds that a block of prompts may be predicted to take. Default: any.',
  )
  flags.DEFINE_string(
    'hardware',
    None,
    'Record of the machine, JSON. Default: the one that calibrate keeps, or '
    'else one that is measured quickly at the first use.',
  )
  flags.DEFINE_string(
    'device_memory',
    None,
    "Budget of accelerator memory, such as 16GiB; also XLA's own cap. "
    'Default: what the device has.',
  )
  flags.DEFINE_string(
    'host_memory',
    None,
    'Budget of host memory, such as 100GiB. Default: most of what is free.',
  )


def define_sampling() -> None:
  """Defines the flags that say how prompts are continued."""
  default = SamplingParams()
  flags.DEFINE_integer(
    'max_new_tokens', default.max_new_tokens, 'Tokens to generate, at most.'
  )
  flags.DEFINE_float(
    'temperature', default.temperature, '0 is greedy; higher is more random.'
  )
  flags.DEFINE_integer(
    'top_k', default.top_k, 'Keep the k likeliest tokens; 0 keeps all.'
  )
  flags.DEFINE_float(
    'top_p', default.top_p, 'Keep the likeliest tokens up to this probability.'
  )
  flags.DEFINE_integer(
    'seed', None, "Seed of every prompt's draws. Default: the prompt's index."
  )
  flags.DEFINE_multi_string('stop', [], 'A string that ends the text.')
  flags.DEFINE_list('stop_token_ids', [], 'Token ids that end the text.')
  flags.DEFINE_bool('ignore_eos', False, 'Go on past the end-of-text token.')
  flags.DEFINE_bool(
    'truncate_prompt', False, 'Cut too long prompts instead of refusing them.'
  )


def sampling() -> SamplingParams:
  """Returns what these flags say.

  Raises:
    InputError: one is out of range.
  """
  try:
    stop_ids = tuple(int(token) for token in FLAGS.stop_token_ids)
  except ValueError:
    raise InputError(
      f'--stop_token_ids takes integers, got {FLAGS.stop_token_ids}'
    ) from None
  names = [field.name for field in dataclasses.fields(SamplingParams)]
  values: dict[str, Any] = {name: FLAGS[name].value for name in names}
  values |= {'stop': tuple(FLAGS.stop), 'stop_token_ids': stop_ids}
  return SamplingParams(**values)


def check_files(*written: str, read: Sequence[str] = ()) -> None:
  """Checks the files of flags of these names; see `files.check_outputs`."""
  outputs, inputs = (
    {name: FLAGS[name].value for name in names}
    for names in (written, (*read, 'hardware'))
  )
  files.check_outputs(outputs, inputs)


def open_model() -> LLM:
  """Opens the model that the flags name.

  Raises:
    InputError: a flag is out of range, or there is no such model.
  """
  arguments: dict[str, Any] = {name: FLAGS[name].value for name in _LOAD}
  return load(**arguments)
