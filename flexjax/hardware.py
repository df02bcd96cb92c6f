"""What a machine can do, as measured or as its data sheet says.

A record is all that planning knows of a machine: how long each thing takes as
a function of how much there is to do. `flexjax calibrate` writes one for the
machine at hand; `configs/hardware/` has some of machines one may not own.
"""

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexjax import atomic
from flexjax.errors import InputError

LINKS = ('disk_to_host', 'host_to_device', 'device_to_host', 'host_to_disk')
PLATFORMS = ('cpu', 'gpu', 'tpu')
DISPATCHED = ('compute', 'read', 'write')
_16_BIT = ('bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class Curve:
  """Seconds that an amount of work takes, through measured points.

  Between two points seconds follow a power of the amount; below the first
  they stay as they are, above the last they grow as between the last two (in
  proportion, if there is but one).

  Attributes:
    points: (amount, seconds), amounts rising, both positive.
  """

  points: tuple[tuple[float, float], ...]

  def __post_init__(self) -> None:
    points = tuple((float(x), float(y)) for x, y in self.points)
    object.__setattr__(self, 'points', points)
    amounts = [x for x, _ in points]
    if not points or any(
      not (0 < v < math.inf) for point in points for v in point
    ):
      raise InputError(f'a curve needs positive points, got {self.points}')
    if any(b <= a for a, b in itertools.pairwise(amounts)):
      raise InputError(f'amounts of a curve must rise, got {amounts}')

  def __call__(self, amount: float) -> float:
    """Returns the seconds that `amount` takes; 0 for nothing."""
    points = self.points
    if amount <= 0:
      return 0.0
    (x0, y0), (x1, y1) = points[0], points[-1]
    if amount <= x0:
      return y0
    if amount >= x1:
      if len(points) == 1:
        return y1 * amount / x1
      before, seconds = points[-2]
      slope = max(0.0, (y1 - seconds) / (x1 - before))
      return y1 + slope * (amount - x1)
    n = bisect.bisect_right(points, (amount, math.inf))
    (x0, y0), (x1, y1) = points[n - 1], points[n]
    part = math.log(amount / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** part


def rising(points: Iterable[tuple[float, float]]) -> Curve:
  """Returns a curve of measured points: more never takes less."""
  found, least = [], 0.0
  for amount, seconds in points:
    least = max(least, seconds)
    found.append((amount, least))
  return Curve(tuple(found))


@dataclasses.dataclass(frozen=True)
class Family:
  """Curves by a size: of a model's width, or of its heads.

  Attributes:
    curves: (size, curve), sizes rising and positive.
  """

  curves: tuple[tuple[float, Curve], ...]

  def __post_init__(self) -> None:
    sizes = [size for size, _ in self.curves]
    if not sizes or any(not (0 < size < math.inf) for size in sizes):
      raise InputError(f'sizes of curves must be positive, got {sizes}')
    if any(b <= a for a, b in itertools.pairwise(sizes)):
      raise InputError(f'sizes of curves must rise, got {sizes}')

  def __call__(self, size: float, amount: float, power: float) -> float:
    """Returns seconds at `size`, those per size**power interpolated.

    Beyond the sizes that are known they stay as at the nearest.
    """
    cost = [
      (float(s), curve(amount) / s**power or 1e-300) for s, curve in self.curves
    ]
    (s0, c0), (s1, c1) = cost[0], cost[-1]
    if size <= s0:
      return c0 * size**power
    if size >= s1:
      return c1 * size**power
    n = bisect.bisect_right(cost, (size, math.inf))
    (s0, c0), (s1, c1) = cost[n - 1], cost[n]
    part = math.log(size / s0) / math.log(s1 / s0)
    return c0 * (c1 / c0) ** part * size**power


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
  """A machine's memories, and what everything takes there.

  Attributes:
    source: where the figures come from.
    unified: host and device are one memory.
    device_memory, host_memory, disk_space: bytes; a disk may have none.
    links: of LINKS, bytes of one transfer -> seconds. Where memory is unified
      there is but the disk.
    mlp: dtype -> width D -> rows -> seconds of an MLP layer with F = 4 D whose
      weights are on the device. All dense products are charged by it.
    prefill_attention: dtype -> head size H -> scores [B, N, T, T] that are
      computed -> seconds.
    decode_attention: dtype -> bytes of cache on the device -> seconds; bits
      likewise, where a packed cache is attended to without expanding it.
    host_attention: dtype -> bytes of cache in host memory -> seconds on the
      CPU; empty where that is not known.
    expand: bits -> numbers of a packed tensor -> seconds.
    pack: bits -> numbers of new cache rows -> seconds.
    row_write: tier, 'device' or 'host' -> bytes of new rows -> seconds in
      which the device computes nothing else; 'cpu' likewise, where the CPU
      attends beside an accelerator; 'disk' -> bytes that are read and written
      to change a row -> seconds of the disk.
    pick: logits [B, V] -> seconds to pick tokens.
    dispatch: of DISPATCHED, seconds of the dispatching thread.
    contention: link -> part of its busy time that computing loses.
    alone: link -> bytes of a transfer -> seconds where no other is under way;
      may lack any, which then take what `links` says.
    fresh: likewise where the run itself has written what it reads, and the
      system still holds it: caches and hidden states on disk.
  """

  name: str
  source: str
  platform: str
  unified: bool
  device_memory: int
  host_memory: int
  disk_space: int
  links: Mapping[str, Curve]
  mlp: Mapping[str, Family]
  prefill_attention: Mapping[str, Family]
  decode_attention: Mapping[str, Curve]
  host_attention: Mapping[str, Curve]
  expand: Mapping[str, Curve]
  pack: Mapping[str, Curve]
  row_write: Mapping[str, Curve]
  pick: Curve
  dispatch: Mapping[str, float]
  contention: Mapping[str, float] = dataclasses.field(default_factory=dict)
  alone: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
  fresh: Mapping[str, Curve] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if self.platform not in PLATFORMS:
      raise InputError(
        f"platform must be one of {', '.join(PLATFORMS)}, got '{self.platform}'"
      )
    for name in ('device_memory', 'host_memory'):
      if not getattr(self, name):
        raise InputError(f'{name} of {self.name} must be positive')
    links: tuple[str, ...] = ()
    if not self.unified:
      links += ('host_to_device', 'device_to_host')
    if self.disk_space:
      links += ('disk_to_host', 'host_to_disk')
    for name, field, wanted in (
      ('links', self.links, links),
      ('expand', self.expand, ('4', '8')),
      ('pack', self.pack, ('4', '8')),
      ('row_write', self.row_write, ('device', 'host')),
      ('dispatch', self.dispatch, DISPATCHED),
    ):
      if missing := [key for key in wanted if key not in field]:
        raise InputError(f'{name} of {self.name} lacks {", ".join(missing)}')
    tables: dict[str, Mapping[str, Any]] = {
      'links': self.links,
      'contention': self.contention,
      'alone': self.alone,
      'fresh': self.fresh,
    }
    for name, table in tables.items():
      if unknown := sorted(set(table) - set(LINKS)):
        raise InputError(
          f"{name} of {self.name}: '{unknown[0]}' is none of {', '.join(LINKS)}"
        )

  def link(
    self, name: str, nbytes: float, *, alone: bool = False, fresh: bool = False
  ) -> float:
    """Returns the seconds of one transfer; none where no link is crossed.

    Args:
      alone: no other transfer is under way on this link.
      fresh: this run has written what is read.
    """
    curve = self.links.get(name)
    if not curve or not nbytes:
      return 0.0
    usual = curve(nbytes)
    seconds = self.fresh.get(name, curve)(nbytes) if fresh else usual
    if alone and name in self.alone:
      ratio = self.alone[name](nbytes) / usual
      # What is fresh takes as much longer one by one as what is not, but may be
      # read in another way: no less, then.
      seconds *= max(1.0, ratio) if fresh else ratio
    return seconds

  @property
  def knows_disk(self) -> bool:
    """Whether the record says anything of a disk."""
    return 'disk_to_host' in self.links

  def knows(self, dtype: str) -> bool:
    """Whether it says how fast `dtype` is computed with."""
    return any(name in self.mlp for name in _alike(dtype))

  def of(self, table: Mapping[str, Any], dtype: str) -> Any:
    """Returns a table's entry for `dtype`, or for one that may stand for it.

    Raises:
      InputError: there is none.
    """
    for name in _alike(dtype):
      if name in table:
        return table[name]
    raise InputError(
      f"the record of '{self.name}' says nothing of {dtype} there; it knows "
      f'{", ".join(table) or "nothing"}'
    )

  def host_attend(self, dtype: str, nbytes: float) -> float:
    """Returns the seconds in which the CPU attends to a cache in host memory.

    In a record that knows float32 alone, as many numbers in 16 bits take as
    long.

    Raises:
      InputError: it says nothing of any such cache.
    """
    table = self.host_attention
    if 'float32' in table and not any(name in table for name in _alike(dtype)):
      return table['float32'](nbytes * 2)
    return self.of(table, dtype)(nbytes)

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` reads: numbers, strings, lists and dicts."""
    return {f.name: _plain(getattr(self, f.name)) for f in _FIELDS}

  @classmethod
  def from_json(cls, fields: Any) -> 'Hardware':
    """Reads a record.

    Raises:
      InputError: a field is missing, unknown or no such thing; names it.
    """
    if not isinstance(fields, Mapping):
      raise InputError('a hardware record is a JSON object')
    names = {f.name for f in _FIELDS}
    if unknown := sorted(fields.keys() - names):
      raise InputError(f"unknown field '{unknown[0]}'")
    if missing := sorted(names - fields.keys() - _OPTIONAL):
      raise InputError(
        f"field '{missing[0]}' is missing; flexjax calibrate writes whole ones"
      )
    values = {}
    for name, value in fields.items():
      try:
        values[name] = _READ[name](value)
      except (ValueError, OverflowError) as e:
        raise InputError(f"field '{name}' cannot be read: {e}") from None
    return cls(**values)


_FIELDS = dataclasses.fields(Hardware)
_OPTIONAL = {'contention', 'alone', 'fresh'}


def read(path: str | Path) -> Hardware:
  """Reads a record from a JSON file.

  Raises:
    InputError: there is none, or it is not right; names the file.
  """
  try:
    return Hardware.from_json(json.loads(Path(path).read_text()))
  except OSError as e:
    raise InputError(f"no hardware record at '{path}': {e.strerror}") from None
  except json.JSONDecodeError as e:
    raise InputError(f"hardware record '{path}' is not JSON: {e}") from None
  except (InputError, ValueError) as e:
    raise InputError(f"hardware record '{path}': {e}") from None


def write(path: str | Path, hardware: Hardware) -> None:
  """Writes a record, whole or not at all; makes its directory.

  Raises:
    OSError: it cannot be written.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write(path, [json.dumps(hardware.to_json(), indent=2), '\n'])


def _alike(dtype: str) -> tuple[str, ...]:
  """What may stand for a dtype: 16 bits for each other; and, though it is too
  fast, for float32."""
  return (dtype, *_16_BIT)


def _plain(value: Any) -> Any:
  if isinstance(value, Curve):
    return [[_short(x), _short(y)] for x, y in value.points]
  if isinstance(value, Family):
    return {str(_short(float(s))): _plain(c) for s, c in value.curves}
  if isinstance(value, Mapping):
    return {name: _plain(v) for name, v in value.items()}
  return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float | int:
  # Counts stay exact, lest two that are close become one.
  return int(value) if value.is_integer() else float(f'{value:.5g}')


def _curve(value: Any) -> Curve:
  if not isinstance(value, list) or any(
    not isinstance(point, list) or len(point) != 2 for point in value
  ):
    raise ValueError(f'{value!r:.60} is no list of pairs')
  return Curve(tuple((_number(x), _number(y)) for x, y in value))


def _family(value: Any) -> Family:
  pairs = [(_size(s), _curve(points)) for s, points in _object(value).items()]
  return Family(tuple(sorted(pairs, key=lambda pair: pair[0])))


def _size(text: str) -> float:
  try:
    return float(text)
  except ValueError:
    raise ValueError(f'{text!r} is no size') from None


def _object(value: Any) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise ValueError(f'{value!r:.60} is no object')
  return value


def _table(read_one: Any) -> Any:
  return lambda value: {k: read_one(v) for k, v in _object(value).items()}


def _number(value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'{value!r} is not a number')
  if not 0 <= value < math.inf:
    raise ValueError(f'{value!r} is negative or not finite')
  return float(value)


def _part(value: Any) -> float:
  if (part := _number(value)) > 1:
    raise ValueError(f'{value!r} is more than 1, all of it')
  return part


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError(f'{value!r} is not text')
  return value


def _flag(value: Any) -> bool:
  if not isinstance(value, bool):
    raise ValueError(f'{value!r} is neither true nor false')
  return value


def _bytes(value: Any) -> int:
  return int(_number(value))


_READ: dict[str, Any] = {
  'name': _text,
  'source': _text,
  'platform': _text,
  'unified': _flag,
  'device_memory': _bytes,
  'host_memory': _bytes,
  'disk_space': _bytes,
  'links': _table(_curve),
  'mlp': _table(_family),
  'prefill_attention': _table(_family),
  'decode_attention': _table(_curve),
  'host_attention': _table(_curve),
  'expand': _table(_curve),
  'pack': _table(_curve),
  'row_write': _table(_curve),
  'pick': _curve,
  'dispatch': _table(_number),
  'contention': _table(_part),
  'alone': _table(_curve),
  'fresh': _table(_curve),
}
