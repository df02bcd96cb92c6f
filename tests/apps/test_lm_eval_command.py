"""The command `flexjax lm_eval`: what it runs, and what it refuses and how."""

import json
import os
import subprocess
import sys

import pytest

from flexjax.cli import lm_eval as command
from flexjax.cli import main
from flexjax.runtime.sources import BUNDLED
from tests.lm_eval_tasks import evaluate, write

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  write(folder)
  return folder


def run(*arguments, **environment):
  """Runs `flexjax lm_eval ARGUMENTS`."""
  return subprocess.run(
    [sys.executable, '-m', 'flexjax', 'lm_eval', *map(str, arguments)],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_command(tasks, tmp_path):
  """A whole run, with error bars, which come from other processes."""
  arguments = ('--include_path', tasks, '--tasks', 'local_words,local_choice')
  done = run(
    '--model_args', f'pretrained={BUNDLED},dtype=float32,weights=0/100/0',
    *arguments, '--output_path', tmp_path / 'out', '--log_samples',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'local_choice' in done.stdout
  assert 'perplexity' in done.stdout
  assert 'incompatible with multithreaded' not in done.stderr
  [file] = (tmp_path / 'out').rglob('results_*.json')
  written = json.loads(file.read_text())
  assert written['config']['model'] == 'flexjax'
  assert written['config']['batch_size'] == 'auto'
  assert written['results']['local_words']['perplexity_stderr,none'] > 0
  expected = evaluate(tasks, 'flexjax', {}, ['choice', 'words'])['results']
  for name, figure in (('choice', 'acc'), ('words', 'perplexity')):
    mine = written['results'][f'local_{name}'][f'{figure},none']
    assert mine == pytest.approx(expected[f'local_{name}'][f'{figure},none'])


@pytest.fixture
def flexjax(capfd, monkeypatch):
  """Returns a function that runs `flexjax lm_eval ARGUMENTS` in here."""
  monkeypatch.setattr('multiprocessing.set_start_method', lambda *a, **k: None)
  monkeypatch.setattr(sys, 'argv', sys.argv)

  def run_here(*arguments):
    with pytest.raises(SystemExit) as end:
      main.main(['flexjax', 'lm_eval', *map(str, arguments)])
    return end.value.code or 0, *capfd.readouterr()

  return run_here


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'task'),
    (['--tasks', 'no_such_task'], 'no_such_task'),
    (['run', '--tasks', 'x', '--model', 'hf'], '--model_args pretrained=DIR'),
    (['--tasks', 'x', '-M', 'hf'], '--model_args pretrained=DIR'),
    (['--tasks', 'local_choice', '--log_samples'], '--output_path'),
    (['--config', '/nowhere.yaml'], '/nowhere.yaml'),
    (['--tasks', 'local_choice', '-a', 'peft=x'], "no 'peft'"),
    (['--tasks', 'x', '--device', 'cuda'], 'JAX_PLATFORMS'),
    (['--tasks', 'local_choice', '--apply_chat_template'], 'chat'),
  ],
  ids=str,
)
def test_refusals(flexjax, tasks, arguments, message):
  if '--tasks' in arguments:
    arguments = [*arguments, '--include_path', tasks]
  code, _, err = flexjax(*arguments)
  last = err.splitlines()[-1]
  assert code == 2
  assert last.startswith('flexjax: ')
  assert message in last


@pytest.mark.parametrize('argv', [['--help'], ['run', '--help']], ids=str)
def test_help(flexjax, argv):
  code, out, _ = flexjax(*argv)
  assert code == 0
  assert '--include_path' in out


def test_other_commands(flexjax, tasks):
  code, out, _ = flexjax('ls', 'tasks', '--include_path', tasks)
  assert code == 0
  assert 'local_rolling' in out


def test_arguments():
  """The model is set, and prompts run together unless told otherwise."""
  size = ['--batch_size', 'auto']
  for given, expected in (
    (['--tasks', 'x'], ['run', *size, '--tasks', 'x']),
    (['run', '-b', '4'], ['run', *size, '-b', '4']),
    (['-C', 'file'], ['run', '-C', 'file']),
    (['--config=file'], ['run', '--config=file']),
  ):
    assert command._arguments(given) == [*expected, '--model', 'flexjax']


def test_missing_harness(flexjax, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  code, out, err = flexjax('--tasks', 'local_choice')
  assert (code, out) == (2, '')
  assert err.startswith('flexjax: ')
  assert 'pip install "flexjax[eval]"' in err
  assert err.count('\n') == 1
