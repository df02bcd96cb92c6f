"""flexjax lm_eval: runs tasks of lm-evaluation-harness.

  flexjax lm_eval --model_args pretrained=DIR --tasks lambada_openai
  flexjax lm_eval ls tasks

The arguments are the harness's own, `--help` too; the model is flexjax. Those
of `--model_args` are what flexjax.load takes, and `pretrained`.
"""

import importlib.util
import multiprocessing
import sys
from collections.abc import Sequence

from flexjax.errors import InputError

_OTHERS = ('ls', 'validate')  # the harness's commands that run no model
_CHECKERS = ('lm_eval.config', 'lm_eval.evaluator')  # what checks arguments


def main(arguments: Sequence[str]) -> None:
  """Hands the arguments to the harness's command line.

  Raises:
    InputError: the harness is not installed, or an argument is not valid.
    SystemExit: of the harness's parser, on what it does not know and --help.
  """
  if importlib.util.find_spec('lm_eval') is None:
    raise InputError(
      'lm_eval needs lm-evaluation-harness: pip install "flexjax[eval]"'
    )
  sys.argv = ['flexjax lm_eval', *_arguments(list(arguments))]
  # The harness's error bars come from a pool of processes: forks of one with
  # JAX's threads may hang.
  multiprocessing.set_start_method('forkserver', force=True)
  from lm_eval.__main__ import cli_evaluate

  import flexjax.apps.lm_eval  # noqa: F401  registers the model

  try:
    cli_evaluate()
  except ValueError as e:
    if _raised_in(e).startswith(_CHECKERS):
      raise InputError(str(e)) from None
    raise


def _arguments(given: list[str]) -> list[str]:
  """Returns the harness's arguments, with the model set.

  Raises:
    InputError: they name a model or a device themselves.
  """
  if given[:1] and given[0] in _OTHERS:
    return given
  rest = given[1:] if given[:1] == ['run'] else given
  names = [argument.split('=')[0] for argument in rest]
  if '--model' in names or '-M' in names:
    raise InputError(
      'lm_eval runs the model flexjax: name a checkpoint by --model_args '
      'pretrained=DIR'
    )
  if '--device' in names:
    raise InputError('the device is chosen by JAX_PLATFORMS, not by --device')
  # The harness's own default is one prompt at a time; what stands later wins.
  of_file = '--config' in names or '-C' in names
  size = [] if of_file else ['--batch_size', 'auto']
  return ['run', *size, *rest, '--model', 'flexjax']


def _raised_in(error: BaseException) -> str:
  """Returns the name of the module that raised an error."""
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  return trace.tb_frame.f_globals.get('__name__', '') if trace else ''
