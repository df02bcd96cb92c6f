"""High-throughput generation with models that do not fit the accelerator.

A name is imported when it is first asked for: the command line says what it can
do, and is interrupted, before JAX has come up.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_HOMES = {
  'LLM': 'flexjax.runtime.llm',
  'InputError': 'flexjax.errors',
  'Output': 'flexjax.runtime.generate',
  'Policy': 'flexjax.config',
  'SamplingParams': 'flexjax.config',
  'Score': 'flexjax.runtime.scores',
  'load': 'flexjax.runtime.llm',
}


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
  return [*globals(), *_HOMES]
