"""Runs command lines, each in a fork of a process that has imported flexjax.

A start costs seconds, a fork none. Reads one JSON object per line: `argv`,
`folder` for what it prints, and `patch`, Python to run before. Answers with
the exit code.
"""

import importlib
import json
import os
import sys
import traceback
import warnings

from flexjax.cli import main

for command in main.COMMANDS:
  importlib.import_module(f'flexjax.cli.{command}')


def child(argv, folder, patch):
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.path.join(folder, name), flags), number)
  os.chdir(folder)
  try:
    exec(patch, {})
    main.main(['flexjax', *argv])
  except SystemExit as e:
    return e.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


if __name__ == '__main__':
  warnings.simplefilter('ignore')  # JAX's backend starts after the fork
  for line in sys.stdin:
    if (pid := os.fork()) == 0:
      code = child(**json.loads(line))
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
