"""What every test runs on: a machine whose speeds are known beforehand."""

import os
import shutil
import signal
import tempfile

import pytest

import flexjax
from flexjax import hardware
from flexjax.runtime import calibrate, devices
from tests import commands
from tests.machines import machine

# A shell's background job ignores it, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Here, because modules of tests keep the environment for their processes.
CACHE = os.environ['FLEXJAX_CACHE_DIR'] = tempfile.mkdtemp('flexjax')


@pytest.fixture(scope='session', autouse=True)
def known_machine():
  """Else every test process would measure this machine, and plan by that."""
  here = devices.machine()
  record = machine(unified=here.unified, flops=1e11, bandwidth=1e10)
  hardware.write(calibrate.cache_path(here), record)
  yield record
  shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope='session', name='flexjax')
def command_line(tmp_path_factory):
  """Returns a function that runs `flexjax ARGUMENTS` in a fork."""
  with commands.forks(tmp_path_factory.mktemp('printed')) as run:
    yield run


@pytest.fixture(scope='module')
def llm():
  """The bundled model."""
  with flexjax.load(dtype='float32', batch_size=4) as llm:
    yield llm


@pytest.fixture(scope='session')
def reference():
  """The same as transformers runs it."""
  from tests.apps import completed  # imports torch

  return completed.reference()
