"""The command line: picks a command, and turns bad input into one line."""

import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from flexjax.errors import InputError
from flexjax.version import VERSION

FLAGS = flags.FLAGS
COMMANDS = {
  'generate': 'continue prompts',
  'plan': 'say how a model would run, and how fast',
  'batch': 'answer a file of requests, however long',
  'eval': 'measure how well a model predicts a text',
  'wrangle': 'match records, fill in values, find errors in tables',
  'bench': 'measure how fast a model is on random prompts',
  'convert': 'write the disk tier of a model',
  'calibrate': 'measure this machine for the planner',
  'lm_eval': 'run tasks of lm-evaluation-harness',
}
_USAGE = 2  # exit code of bad input
_INTERRUPTED = 130
_TIDIED_LATER = ('lm_eval',)  # what the harness opens is closed at exit


def main(argv: Sequence[str] | None = None) -> None:
  """Runs `flexjax COMMAND --flags`; exits with 0, 2 or 130, or with what the
  command says of its results."""
  given = list(sys.argv if argv is None else argv)
  code = _main(given)
  # A process that calls this function is not this function's to end.
  if code == _INTERRUPTED and argv is None and given[1] not in _TIDIED_LATER:
    _end(code)
  sys.exit(code)


def _end(code: int) -> None:
  """Ends this process at once, after what its command has tidied. XLA may still
  compile what was waited for, in a thread that would crash once an interpreter
  that exits takes the client from it."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def _main(argv: list[str]) -> int:
  name = argv[1] if len(argv) > 1 else '--help'
  if name in ('help', '--help', '-h', '--helpshort'):
    print(_overview())
    return 0
  if name == '--version':
    print(f'flexjax {VERSION}')
    return 0
  if name not in COMMANDS:
    return _refuse(f"no command is called '{name}'; there are {_names()}")
  try:
    command = _import(name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(command, 'main'):  # it reads its arguments itself, --help too
      code = command.main(argv[2:]) or 0
    else:
      code = _run(command, name, argv[2:])
    sys.stdout.flush()  # here, where a reader that has gone is no error
  except flags.Error as e:
    # Of what is no boolean absl says a tuple.
    return _refuse(re.sub(r"\('([^']*)', .*\)$", r'\1', str(e)))
  except BrokenPipeError:  # whoever reads the results has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (InputError, OSError) as e:
    return _refuse(str(e))
  except KeyboardInterrupt:
    print('flexjax: interrupted', file=sys.stderr)
    return _INTERRUPTED
  return code


def _import(name: str) -> ModuleType:
  """Imports a command. Interrupted meanwhile, the process ends at once: there
  is nothing to tidy yet, and libraries may lose what interrupts them."""
  handler = signal.getsignal(signal.SIGINT)
  if handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    return importlib.import_module(f'flexjax.cli.{name}')
  finally:
    if handler is signal.default_int_handler:
      signal.signal(signal.SIGINT, handler)


def _run(command, name: str, arguments: Sequence[str]) -> int:
  """Reads a command's flags and runs it, or prints its help; returns the exit
  code."""
  command.define()
  if {'--help', '-h', '--helpshort', '--helpfull'} & set(arguments):
    print(_help(command))
    return 0
  rest = FLAGS([f'flexjax {name}', *arguments])[1:]
  if rest:
    raise InputError(f"'{rest[0]}' is not a flag; flags look like --model=DIR")
  return command.run() or 0


def _refuse(message: str) -> int:
  line = ' '.join(message.split())
  print(f'flexjax: {line}', file=sys.stderr)
  return _USAGE


def _names() -> str:
  return ', '.join(COMMANDS)


def _overview() -> str:
  lines = [f'  {name:10} {what}' for name, what in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: flexjax COMMAND [--flag=value ...]',
      '',
      *lines,
      '',
      'flexjax COMMAND --help lists the flags.',
    ]
  )


def _help(command) -> str:
  lines = [(command.__doc__ or '').rstrip(), '']
  own = (m for m in FLAGS.flags_by_module_dict() if m.startswith('flexjax'))
  for module in own:
    for flag in FLAGS.flags_by_module_dict()[module]:
      default = '' if flag.default in (None, []) else f' [{flag.default}]'
      lines.append(f'  --{flag.name}{default}\n      {flag.help}')
  return '\n'.join(lines)
