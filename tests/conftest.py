"""What every test runs on: a machine whose speeds are known beforehand."""

import os
import shutil
import tempfile

import pytest

from flexjax import hardware
from flexjax.runtime import calibrate, devices
from tests.machines import machine

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
