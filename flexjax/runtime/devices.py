"""The machine: which device computes, its memories, and their limits.

Limits must be set before JAX starts its backend, so nothing here touches a
device until `machine` is called.
"""

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from flexjax.errors import InputError

ATTENDED = ('float32', 'bfloat16')[: 1 + (jax.__version_info__ >= (0, 11))]
"""What a CPU attends to as it is.

Other numbers of 16 bits XLA:CPU converts to float32 and writes down as that,
all of a cache for a token, which takes ten times as long; before 0.11 bfloat16
too, and once more to write a row.
"""
_GIB = 2**30
_FUSED_SINCE = 8.0  # compute capability: Ampere
_FRACTION = 'XLA_CLIENT_MEM_FRACTION'
_FRACTIONS = (_FRACTION, 'XLA_PYTHON_CLIENT_MEM_FRACTION')
_PINNED_LIMIT = 'XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB'


@dataclasses.dataclass(frozen=True)
class Machine:
  """Where to compute and to keep things.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    device: the accelerator's memory.
    pinned: host memory that the accelerator copies from at full rate.
    cpu: the CPU backend's memory.
    unified: device and host are one memory.
    device_memory: bytes the device has for us; `host_memory` likewise.
  """

  platform: str
  device: SingleDeviceSharding
  pinned: SingleDeviceSharding
  cpu: SingleDeviceSharding
  unified: bool
  device_memory: int
  host_memory: int

  @property
  def fused(self) -> bool:
    """Whether it runs cuDNN's attention and the kernels of `quant.kernels`."""
    device: Any = next(iter(self.device.device_set))
    capability = getattr(device, 'compute_capability', '0')
    if self.platform != 'gpu' or not re.fullmatch(r'[0-9.]+', capability):
      return False  # of another make it is a name
    return float(capability) >= _FUSED_SINCE

  @property
  def chunk_tokens(self) -> int:
    """See `chunk_tokens`."""
    return chunk_tokens(self.platform)


def chunk_tokens(platform: str) -> int:
  """Returns tokens of a prefill that fill a device; more only take memory."""
  return 2048 if platform == 'cpu' else 4096


def limit(device_memory: int | None, host_memory: int | None) -> None:
  """Turns budgets into XLA's own caps; no effect once JAX has started.

  An environment that already sets them is left alone.
  """
  if host_memory is not None:
    gib = host_memory // _GIB + 2  # room for small transfers
    os.environ.setdefault(_PINNED_LIMIT, str(gib))
  elif _PINNED_LIMIT not in os.environ:
    os.environ[_PINNED_LIMIT] = str(_available_memory() // _GIB)
  if device_memory is None or any(name in os.environ for name in _FRACTIONS):
    return
  if (total := _gpu_memory()) is not None:
    fraction = min(device_memory / total, 0.95)
    os.environ[_FRACTION] = f'{fraction:.6f}'


def machine() -> Machine:
  """Returns this machine; starts JAX's backend."""
  device = jax.devices()[0]
  platform = device.platform
  cpu = SingleDeviceSharding(jax.devices('cpu')[0])
  available = _available_memory()
  if platform == 'cpu':
    return Machine(
      platform, cpu, cpu, cpu, True, available * 5 // 10, available * 3 // 10
    )
  stats = device.memory_stats() or {}
  return Machine(
    platform,
    SingleDeviceSharding(device),
    SingleDeviceSharding(device, memory_kind='pinned_host'),
    cpu,
    False,
    int(stats.get('bytes_limit', 16 * _GIB) * 0.97),
    available * 8 // 10,
  )


def allocator_peak(machine: Machine) -> int | None:
  """Returns the most bytes the device's allocator has handed out, if known."""
  device: Any = next(iter(machine.device.device_set))
  return (device.memory_stats() or {}).get('peak_bytes_in_use')


def free_disk(path: Path) -> int:
  """Returns the free bytes of the file system that will hold `path`.

  Raises:
    InputError: it is no directory, or cannot become one.
  """
  above = path
  while not above.exists():
    above = above.parent
  wrong = f"disk_dir '{path}' cannot be written: '{above}' is "
  if not above.is_dir():
    raise InputError(f'{wrong}not a directory')
  if above != path and not os.access(above, os.W_OK | os.X_OK):
    raise InputError(f'{wrong}not for this user')
  return shutil.disk_usage(above).free


def _available_memory() -> int:
  """Bytes of memory that a new program can have."""
  try:
    with open('/proc/meminfo') as f:
      fields = dict(line.split(':', 1) for line in f)
    return int(fields['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2


def _gpu_memory() -> int | None:
  """Total bytes of the first GPU, asked without starting JAX."""
  try:
    out = subprocess.run(
      [
        'nvidia-smi',
        '--query-gpu=memory.total',
        '--format=csv,noheader,nounits',
      ],
      capture_output=True,
      text=True,
      timeout=60,
      check=True,
    )
    return int(out.stdout.split()[0]) * 2**20
  except (OSError, subprocess.SubprocessError, ValueError, IndexError):
    return None
