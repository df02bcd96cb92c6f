"""flexjax calibrate: measure this machine for the planner.

  flexjax calibrate --disk_dir=/nvme/flexjax

Takes about a minute, in which the machine should do nothing else. Without
--output the record goes where later runs look for it.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import rich.console
import rich.table
from absl import flags

from flexjax import hardware
from flexjax.cli import report
from flexjax.config import format_bytes
from flexjax.errors import InputError
from flexjax.hardware import Curve, Hardware
from flexjax.runtime import calibrate, devices

FLAGS = flags.FLAGS
_WIDTH = 100  # of the table where there is no terminal


def define() -> None:
  flags.DEFINE_string(
    'disk_dir',
    None,
    'Directory of the disk tier. Default: no disk is measured.',
  )
  flags.DEFINE_bool(
    'quick', False, 'Measure less, as a run does that finds no record.'
  )
  flags.DEFINE_string(
    'output',
    None,
    'File for the record, JSON. Default: where runs on this machine look.',
  )


def run() -> None:
  devices.limit(None, None)
  if FLAGS.output:
    path = Path(FLAGS.output)
  else:
    path = calibrate.cache_path(devices.machine())
  _check_writable(path)
  with report.bar() as on_progress:
    record = calibrate.measure(
      disk_dir=Path(FLAGS.disk_dir) if FLAGS.disk_dir else None,
      quick=FLAGS.quick,
      on_progress=on_progress,
    )
  hardware.write(path, record)
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=_WIDTH)
  console.print(_table(record))
  print(path)


def _check_writable(path: Path) -> None:
  """Refuses a file that cannot be written before a minute is spent on it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise InputError(f"output '{path}' cannot be written")


class _Unit(NamedTuple):
  """How amounts and rates of a curve are shown.

  Attributes:
    amount: writes an amount.
    work: how much of `rate` an amount is.
    rate: what is done in a second; '' where a rate says nothing.
  """

  amount: Callable[[float], str]
  work: float
  rate: str


def _count(value: float) -> str:
  return f'{_scaled(value)}'.strip()


_BYTES = _Unit(format_bytes, 1, 'B/s')
_NUMBERS = _Unit(lambda n: f'{_count(n)} numbers', 1, 'numbers/s')


def _table(record: Hardware) -> rich.table.Table:
  title = f'{record.name}: {record.source}'
  table = rich.table.Table(title=title, box=None, pad_edge=False)
  table.add_column('')
  for name in ('amount', 'time', 'rate'):
    table.add_column(name, justify='right')
  for what, unit, curve in _curves(record):
    table.add_row(what, *_ends(curve, unit))
  for name, seconds in record.dispatch.items():
    table.add_row(f'dispatch {name}', '', _time(seconds), '')
  for name, part in record.contention.items():
    link = name.replace('_', ' ')
    table.add_row(f'computing loses, {link}', '', f'{100 * part:.0f} %', '')
  return table


def _curves(record: Hardware) -> Iterator[tuple[str, _Unit, Curve]]:
  for link, curve in record.links.items():
    yield link.replace('_', ' '), _BYTES, curve
  for dtype, family in record.mlp.items():
    for width, curve in family.curves:
      # Two products with 4 D^2 weights, a multiplication and an addition each.
      unit = _Unit(lambda n: f'{n:.0f} rows', 16 * width * width, 'FLOP/s')
      yield f'mlp {dtype} D={width:g}', unit, curve
  for dtype, family in record.prefill_attention.items():
    for size, curve in family.curves:
      # Scores and values, likewise.
      unit = _Unit(lambda n: f'{_count(n)} scores', 4 * size, 'FLOP/s')
      yield f'prefill attention {dtype} H={size:g}', unit, curve
  for name in ('decode_attention', 'host_attention'):
    for dtype, curve in getattr(record, name).items():
      yield f'{name.replace("_", " ")} {dtype}', _BYTES, curve
  for name in ('expand', 'pack'):
    for bits, curve in getattr(record, name).items():
      yield f'{name} {bits} bits', _NUMBERS, curve
  for tier, curve in record.row_write.items():
    yield f'write rows, {tier}', _BYTES, curve
  yield 'pick', _Unit(lambda n: f'{_count(n)} logits', 1, ''), record.pick


def _ends(curve: Curve, unit: _Unit) -> tuple[str, str, str]:
  """Amount, time and rate at a curve's first and last points."""

  def rate(point: tuple[float, float]) -> str:
    amount, seconds = point
    return _scaled(amount * unit.work / seconds) + unit.rate

  ends = [curve.points[0], curve.points[-1]][: len(curve.points)]
  amounts = ' .. '.join(unit.amount(x) for x, _ in ends)
  times = ' .. '.join(_time(y) for _, y in ends)
  return amounts, times, ' .. '.join(map(rate, ends)) if unit.rate else ''


def _time(seconds: float) -> str:
  for scale, unit in ((1, 's'), (1e-3, 'ms')):
    if seconds >= scale:
      return f'{seconds / scale:.3g} {unit}'
  return f'{seconds * 1e6:.3g} us'


def _scaled(value: float) -> str:
  """Writes 1234567 as '1.23 M': a number and the letter of its unit."""
  power = min(4, max(0, math.floor(math.log10(value) / 3))) if value else 0
  return f'{value / 1000**power:.3g} {("", "k", "M", "G", "T")[power]}'
