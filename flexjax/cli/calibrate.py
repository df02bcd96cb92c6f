"""flexjax calibrate: measure this machine for the planner.

  flexjax calibrate --disk_dir=/nvme/flexjax

Takes about a minute, in which the machine should do nothing else. Without
--output the record goes where later runs look for it.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import rich.table
from absl import flags

from flexjax import hardware
from flexjax.cli import files, report
from flexjax.config import format_bytes
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
    path.parent.mkdir(parents=True, exist_ok=True)
  files.check_writable('output', str(path))
  with report.bar() as on_progress:
    record = calibrate.measure(
      disk_dir=Path(FLAGS.disk_dir) if FLAGS.disk_dir else None,
      quick=FLAGS.quick,
      on_progress=on_progress,
    )
  hardware.write(path, record)
  print(f'{record.name}\n{record.source}\n')
  console = report.console(_WIDTH)
  console.print(_table(record))
  print(f'\n{path}')


class _Row(NamedTuple):
  """A curve, and how it is shown.

  Attributes:
    amount: writes an amount.
    work: how much of `rate` an amount is.
    rate: what is done in a second; '' where a rate says nothing.
  """

  what: str
  curve: Curve
  amount: Callable[[float], str]
  work: float = 1
  rate: str = ''


def _table(record: Hardware) -> rich.table.Table:
  """A row for every curve: its ends, and the rate at the upper one."""
  table = rich.table.Table(box=None, pad_edge=False)
  table.add_column('what')
  for name in ('least', 'takes', 'most', 'takes', 'rate'):
    table.add_column(name, justify='right')
  for row in _rows(record):
    table.add_row(row.what, *_ends(row))
  for name, seconds in record.dispatch.items():
    table.add_row(f'dispatch, {name}', '', _time(seconds))
  for name, part in record.contention.items():
    what = f'{name.replace("_", " ")}, lost to computing'
    table.add_row(what, *[''] * 4, f'{100 * part:.0f} %')
  return table


def _rows(record: Hardware) -> Iterator[_Row]:
  for link, curve in record.links.items():
    yield _Row(link.replace('_', ' '), curve, format_bytes, 1, 'B/s')
  for link, curve in record.alone.items():
    what = f'{link.replace("_", " ")}, one by one'
    yield _Row(what, curve, format_bytes, 1, 'B/s')
  for link, curve in record.fresh.items():
    what = f'{link.replace("_", " ")}, just written'
    yield _Row(what, curve, format_bytes, 1, 'B/s')
  for dtype, family in record.mlp.items():
    for width, curve in family.curves:
      # Two products with 4 D^2 weights, a multiplication and an addition each.
      what, work = f'mlp {dtype} D={width:g} (rows)', 16 * width * width
      yield _Row(what, curve, '{:.0f}'.format, work, 'FLOP/s')
  for dtype, family in record.prefill_attention.items():
    for size, curve in family.curves:
      what = f'prefill {dtype} H={size:g} (scores)'
      # Scores and values, likewise.
      yield _Row(what, curve, _scaled, 4 * size, 'FLOP/s')
  for name, where in (('decode', 'decode'), ('host', 'decode on the CPU')):
    for dtype, curve in getattr(record, f'{name}_attention').items():
      yield _Row(f'{where} {dtype}', curve, format_bytes, 1, 'B/s')
  for name in ('expand', 'pack'):
    for bits, curve in getattr(record, name).items():
      what = f'{name} {bits} bits (numbers)'
      yield _Row(what, curve, _scaled, 1, 'numbers/s')
  for tier, curve in record.row_write.items():
    yield _Row(f'write rows, {tier}', curve, format_bytes, 1, 'B/s')
  yield _Row('pick (logits)', record.pick, _scaled)


def _ends(row: _Row) -> list[str]:
  """Amount and time at a curve's first and last points, and the rate there."""
  points = row.curve.points
  cells = []
  for amount, seconds in (points[0], points[-1]):
    cells += [row.amount(amount), _time(seconds)]
  rate = _scaled(amount * row.work / seconds) + row.rate if row.rate else ''
  return [*cells, rate]


def _time(seconds: float) -> str:
  for scale, unit in ((1, 's'), (1e-3, 'ms')):
    if seconds >= scale:
      return f'{seconds / scale:.3g} {unit}'
  return f'{seconds * 1e6:.3g} us'


def _scaled(value: float) -> str:
  """Writes 1234567 as '1.23 M': a number and the letter of its unit."""
  power = min(5, max(0, math.floor(math.log10(value) / 3))) if value else 0
  return f'{value / 1000**power:.3g} {("", *"kMGTP")[power]}'
