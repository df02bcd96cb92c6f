"""Plans without weights: for a model by name, on this machine or another."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexjax import hardware as records
from flexjax.config import (
  ModelConfig,
  Packing,
  Policy,
  Split,
  parse_bits,
  parse_bytes,
)
from flexjax.errors import InputError
from flexjax.hardware import Hardware
from flexjax.models import presets
from flexjax.policy.search import Request
from flexjax.runtime import calibrate, devices, sources
from flexjax.runtime.formats import Format
from flexjax.runtime.planner import Choice, Machine, Planner, cache_choices

_LATENCIES = 8  # between the shortest block and the best one


def plan(
  model: str | Path | None = None,
  *,
  prompt_len: int = 512,
  gen_len: int = 32,
  num_prompts: int | None = None,
  hardware: str | Path | Hardware | None = None,
  max_latency: float | None = None,
  **flags: Any,
) -> Choice:
  """Returns the fastest plan for a model, of which no weights are needed.

  Args:
    model: a preset such as opt-175b, or whatever `load` takes.
    prompt_len, gen_len: tokens of every prompt, and to generate for it.
    num_prompts: how many there are; None for as many as one likes.
    hardware: a record or its file; None for this machine.
    max_latency: seconds that a block may take.
    flags: what `load` takes to say how a model runs, and `disk_space`, bytes
      or like '1TiB', 0 for no disk.

  Raises:
    InputError: nothing fits, or an argument is out of range.
  """
  planner, request = _prepare(
    model, prompt_len, gen_len, num_prompts, hardware, max_latency, flags
  )
  return planner.choose(request)


def pareto(
  model: str | Path | None = None,
  *,
  prompt_len: int = 512,
  gen_len: int = 32,
  num_prompts: int | None = None,
  hardware: str | Path | Hardware | None = None,
  max_latency: float | None = None,
  **flags: Any,
) -> list[Choice]:
  """Returns plans of which none is both faster and shorter than another, by
  seconds of a block; see `plan`."""
  planner, request = _prepare(
    model, prompt_len, gen_len, num_prompts, hardware, max_latency, flags
  )
  best = planner.choose(request)
  found = [best]
  small = dataclasses.replace(
    request,
    batch_size=request.batch_size or 1,
    num_batches=request.num_batches or 1,
  )
  least = planner.choose(small)
  found.append(least)
  ratio = best.prediction.seconds / least.prediction.seconds
  for n in range(1, _LATENCIES):
    bound = least.prediction.seconds * ratio ** (n / _LATENCIES)
    try:
      found.append(
        planner.choose(dataclasses.replace(request, max_latency=bound))
      )
    except InputError:  # nothing between is so short
      continue
  return _undominated(found, request)


def _undominated(choices: Sequence[Choice], request: Request) -> list[Choice]:
  """By what all prompts get: a last block may be a smaller one."""
  kept: list[Choice] = []
  rate = 0.0
  for choice in sorted(choices, key=lambda c: c.prediction.seconds):
    work = choice.plan.problem.work
    mine = request.rate(work, choice.prediction.seconds)
    if mine > rate * (1 + 1e-6):
      kept.append(choice)
      rate = mine
  return kept


def _prepare(
  model, prompt_len, gen_len, num_prompts, hardware, max_latency, flags
) -> tuple[Planner, Request]:
  for name, value, least in (
    ('prompt_len', prompt_len, 1),
    ('gen_len', gen_len, 1),
    ('num_prompts', num_prompts, 1),
    ('batch_size', flags.get('batch_size'), 1),
    ('num_batches', flags.get('num_batches'), 1),
  ):
    if value is not None and value < least:
      raise InputError(f'{name} must be at least {least}, got {value}')
  if max_latency is not None and not 0 < max_latency < math.inf:
    raise InputError(f'max_latency must be positive, got {max_latency}')
  config, held = _model(model)
  if prompt_len + gen_len > config.max_positions:
    raise InputError(
      f'{prompt_len} prompt tokens and {gen_len} new ones exceed the context '
      f'of {config.max_positions}'
    )
  request = Request(
    prompt_len=prompt_len,
    gen_len=gen_len,
    prompts=num_prompts,
    batch_size=flags.pop('batch_size', None),
    num_batches=flags.pop('num_batches', None),
    max_latency=max_latency,
  )
  return _planner(config, held, hardware, **flags), request.clamped()


def _model(model: str | Path | None) -> tuple[ModelConfig, Format | None]:
  """Returns a model's configuration, and the format that settles its weights
  where it is a converted folder."""
  name = str(model).lower().rsplit('/', 1)[-1]
  if name in presets.NAMES and not Path(str(model)).is_dir():
    return presets.preset(name), None
  try:
    source = sources.find_source(model)
  except InputError as e:
    if Path(str(model)).is_dir():
      raise
    names = ', '.join(presets.NAMES)
    raise InputError(f'{e}; there are presets {names}') from None
  return source.config, source.held.form if source.held else None


def _planner(
  config: ModelConfig,
  held: Format | None,
  hardware: str | Path | Hardware | None,
  *,
  on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
  dtype: str = 'auto',
  weight_bits: int | str | None = None,
  cache_bits: int | str | None = None,
  allow_lossy: bool = False,
  device_memory: int | str | None = None,
  host_memory: int | str | None = None,
  disk_space: int | str | None = None,
  disk_dir: str | Path | None = None,
  **policy: Any,
) -> Planner:
  sources.check_dtype(dtype)
  splits: dict[str, Any] = {
    name: Split.parse(policy.pop(name, None), name)
    for name in ('weights', 'cache', 'hidden')
  }
  mine = Policy(
    **splits,
    weight_bits=parse_bits(weight_bits, 'weight_bits'),
    cache_bits=parse_bits(cache_bits, 'cache_bits'),
    **({'attention': None} | policy),
  )
  device = parse_bytes(device_memory, 'device_memory')
  host = parse_bytes(host_memory, 'host_memory')
  record = _record(hardware, device, host, disk_dir, on_progress)
  disk = record.disk_space
  if disk_space is not None:
    zero = str(disk_space) == '0'
    disk = 0 if zero else parse_bytes(disk_space, 'disk_space') or 0
  if disk and not record.knows_disk:
    raise InputError(f"the record of '{record.name}' says nothing of a disk")
  budgets = {
    'device': device or record.device_memory,
    'host': host or record.host_memory,
    'disk': disk,
  }

  def make(lossy: bool) -> Planner:
    return Planner(
      config,
      mine,
      [held] if held else _forms(config, record, dtype, mine, lossy),
      record,
      Machine(
        unified=record.unified,
        chunk_tokens=devices.chunk_tokens(record.platform),
        budgets=lambda form: budgets,
        disk_flag=_disk_flag(hardware, record),
      ),
      cache_bits=cache_choices(mine, lossy),
      lossy=None if lossy else functools.partial(make, True),
    )

  return make(allow_lossy)


def _record(hardware, device, host, disk_dir, on_progress) -> Hardware:
  if isinstance(hardware, Hardware):
    return hardware
  if hardware is not None:
    return records.read(hardware)
  devices.limit(device, host)
  root = Path(disk_dir) if disk_dir else None
  record, _ = calibrate.load_or_measure(devices.machine(), root, on_progress)
  return record


def _disk_flag(hardware, record: Hardware) -> str:
  if hardware is None:
    return '--disk_dir'
  return '--disk_space' if record.knows_disk else ''


def _forms(
  config: ModelConfig,
  record: Hardware,
  dtype: str,
  policy: Policy,
  allow_lossy: bool,
) -> list[Format]:
  dtypes = [dtype]
  if dtype == 'auto':
    on_cpu = record.platform == 'cpu'
    dtypes = ['float32', 'bfloat16'] if on_cpu else [config.checkpoint_dtype]
  bits: Mapping[bool, tuple[int, ...]] = {
    True: (16, 4),
    False: (policy.weight_bits or 16,),
  }
  size = policy.group_size or Packing.group_size
  return [
    Format(name, Packing(n, size) if n < 16 else Packing())
    for name in dtypes
    for n in bits[allow_lossy and policy.weight_bits is None]
  ]
