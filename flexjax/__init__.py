"""High-throughput generation with models that do not fit the accelerator."""

from flexjax.config import Policy, SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.generate import Output
from flexjax.runtime.llm import LLM, load
from flexjax.runtime.scores import Score

__all__ = [
  'LLM',
  'InputError',
  'Output',
  'Policy',
  'SamplingParams',
  'Score',
  'load',
]
