"""What every test runs on: a machine whose speeds are known beforehand."""

import os

import pytest

from flexjax import hardware
from flexjax.runtime import calibrate, devices
from tests.machines import machine


@pytest.fixture(scope='session', autouse=True)
def known_machine(tmp_path_factory):
  """Else every test process would measure this machine, and plan by that."""
  folder = tmp_path_factory.mktemp('cache')
  before = os.environ.get('FLEXJAX_CACHE_DIR')
  os.environ['FLEXJAX_CACHE_DIR'] = str(folder)
  unified = devices.machine().unified
  record = machine(unified=unified, flops=1e11, bandwidth=1e10)
  hardware.write(calibrate.cache_path(devices.machine()), record)
  yield folder
  if before is None:
    del os.environ['FLEXJAX_CACHE_DIR']
  else:
    os.environ['FLEXJAX_CACHE_DIR'] = before
