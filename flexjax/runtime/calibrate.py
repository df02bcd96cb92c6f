"""Measures this machine, and keeps the record for the next run.

`timing` knows how anything is timed; here it becomes a `Hardware` record,
and the record a file that is found again.
"""

import dataclasses
import datetime
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flexjax import hardware
from flexjax.errors import InputError
from flexjax.hardware import Curve, Hardware
from flexjax.runtime import devices
from flexjax.runtime.devices import Machine
from flexjax.runtime.timing import contention, disks, dispatch, layers, links
from flexjax.runtime.timing.points import points
from flexjax.runtime.timing.stopwatch import Stopwatch
from flexjax.version import VERSION

OnProgress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)
_EDITION = 6  # of what is measured and how: older records are not found
_DISK_LINKS = ('disk_to_host', 'host_to_disk')


def _silent(what: str, done: int, total: int) -> None:
  pass


def measure(
  *,
  disk_dir: Path | None,
  quick: bool,
  on_progress: OnProgress = _silent,
) -> Hardware:
  """Measures this machine, which should be doing nothing else.

  Args:
    disk_dir: of the disk tier to measure, left as it was; None for no disk.
    quick: fewer points and repetitions, seconds instead of a minute.
    on_progress: called as on_progress('calibrate', done, total).

  Raises:
    InputError: `disk_dir` cannot be written.
  """
  return _measure(devices.machine(), disk_dir, quick, on_progress)


def _measure(
  machine: Machine,
  disk_dir: Path | None,
  quick: bool,
  on_progress: OnProgress,
) -> Hardware:
  todo = points(machine.platform, quick)
  watch = Stopwatch(machine, todo.seconds)
  stages: dict[str, Callable[[], Any]] = {
    # First, because a disk may be refused.
    'links': lambda: _links(watch, todo, disk_dir),
    'mlp': lambda: layers.mlp(watch, todo),
    'prefill_attention': lambda: layers.prefill_attention(watch, todo),
    'decode_attention': lambda: layers.decode_attention(watch, todo),
    'host_attention': lambda: layers.host_attention(watch, todo),
    'expand': lambda: layers.expand(watch, todo),
    'pack': lambda: layers.pack(watch, todo),
    'row_write': lambda: _row_write(watch, todo, disk_dir),
    'pick': lambda: layers.pick(watch, todo),
    'dispatch': lambda: dispatch.dispatch(watch),
    'contention': lambda: contention.losses(watch, todo, disk_dir),
  }
  fields: dict[str, Any] = {}
  for done, (name, stage) in enumerate(stages.items()):
    on_progress('calibrate', done, len(stages))
    fields[name] = stage()
  fields |= fields['links']
  on_progress('calibrate', len(stages), len(stages))
  return Hardware(
    name=_name(machine),
    source=_source(disk_dir, quick),
    platform=machine.platform,
    unified=machine.unified,
    device_memory=machine.device_memory,
    host_memory=machine.host_memory,
    disk_space=devices.free_disk(disk_dir) if disk_dir else 0,
    **fields,
  )


def _links(
  watch: Stopwatch, todo, disk_dir: Path | None
) -> dict[str, dict[str, Curve]]:
  """Returns the fields of a record that are about links."""
  disk = disks.curves(watch, todo, disk_dir) if disk_dir else {}
  host = links.host_links(watch, todo)
  return disk | {'links': {**disk.get('links', {}), **host}}


def _row_write(watch: Stopwatch, todo, disk_dir: Path | None):
  curves = links.row_write(watch, todo)
  if disk_dir:
    curves['disk'] = disks.row_write(watch, todo, disk_dir)
  return curves


def _source(disk_dir: Path | None, quick: bool) -> str:
  text = (
    f'measured {datetime.date.today()} by flexjax calibrate'
    f'{" --quick" if quick else ""}, jax {jax.__version__}'
  )
  return text + ('; disk reads from a warm page cache' if disk_dir else '')


def load_or_measure(
  machine: Machine,
  disk_dir: Path | None,
  on_progress: OnProgress = _silent,
) -> tuple[Hardware, bool]:
  """Returns this machine's record, and whether any of it is new.

  It is read where `cache_path` says; what is not there, or cannot be read, is
  measured quickly and written there. A cache that cannot be written costs the
  next run the same again and is no error. Memories and disk space are as they
  are now, not as they were when it was measured.

  Raises:
    InputError: `disk_dir` cannot be written.
  """
  path = cache_path(machine)
  try:
    record, fresh = hardware.read(path), False
  except InputError as e:
    if path.exists():
      _log.warning('measured anew: %s', e)
    record, fresh = _measure(machine, disk_dir, True, on_progress), True
  if disk_dir and any(link not in record.links for link in _DISK_LINKS):
    record, fresh = _with_disk(machine, record, disk_dir), True
  if fresh:
    try:
      hardware.write(path, record)
    except OSError as e:
      _log.warning('the measurements of this machine cannot be kept: %s', e)
  record = dataclasses.replace(
    record,
    device_memory=machine.device_memory,
    host_memory=machine.host_memory,
    disk_space=devices.free_disk(disk_dir) if disk_dir else 0,
  )
  return record, fresh


def _with_disk(machine: Machine, record: Hardware, disk_dir: Path) -> Hardware:
  """Measures the disk that a record says nothing of."""
  todo = points(machine.platform, quick=True)
  watch = Stopwatch(machine, todo.seconds)
  disk = disks.curves(watch, todo, disk_dir)
  return dataclasses.replace(
    record,
    source=f'{record.source}; disk: {_source(disk_dir, True)}',
    links={**record.links, **disk['links']},
    alone={**record.alone, **disk['alone']},
    fresh={**record.fresh, **disk['fresh']},
    row_write={
      **record.row_write,
      'disk': disks.row_write(watch, todo, disk_dir),
    },
    contention={
      **contention.disk_losses(watch, todo, disk_dir),
      **record.contention,
    },
    disk_space=devices.free_disk(disk_dir),
  )


def cache_path(machine: Machine) -> Path:
  """Returns the file of this machine's record, which may not be there.

  In $FLEXJAX_CACHE_DIR, else $XDG_CACHE_HOME/flexjax, else ~/.cache/flexjax.
  """
  name = re.sub('[^a-z0-9]+', '-', _name(machine).lower()).strip('-')
  return _cache_dir() / (
    f'hardware-{name}-{_cores()}-cores-jax{jax.__version__}'
    f'-flexjax{VERSION}-{_EDITION}.json'
  )


def _cache_dir() -> Path:
  if own := os.environ.get('FLEXJAX_CACHE_DIR'):
    return Path(own)
  if shared := os.environ.get('XDG_CACHE_HOME'):
    return Path(shared) / 'flexjax'
  try:
    return Path.home() / '.cache' / 'flexjax'
  except RuntimeError:  # a user without a home
    return Path(tempfile.gettempdir()) / 'flexjax'


def _name(machine: Machine) -> str:
  if machine.platform != 'cpu':
    device: Any = next(iter(machine.device.device_set))
    return device.device_kind
  return f'{_cpu_model()}, {_cores()} cores'


def _cpu_model() -> str:
  try:
    text = Path('/proc/cpuinfo').read_text()
  except OSError:
    return 'CPU'
  match = re.search(r'^model name\s*:\s*(.+)$', text, re.MULTILINE)
  return match[1].strip() if match else 'CPU'


def _cores() -> int:
  if hasattr(os, 'sched_getaffinity'):  # what this process may use
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
