"""Frozen records that state a problem: model, workload, policy, sampling.

They hide nothing and import no JAX, so that planning and scheduling can be
read, tested and run on a machine without an accelerator.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from flexjax.errors import InputError

MAX_DISK_WRITES = 3  # on their way at once: each holds its rows in memory
QUERY_CHUNK = 256  # positions whose scores a prefill computes together
SCORE_BYTES = 64 * 2**20  # of float32 scores that a prefill holds at once
DISK_CACHE_CHUNK = 2 * 2**20  # bytes of a cache on disk that a row rewrites
DTYPE_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2}
_UNITS = {'': 1, 'k': 10**3, 'm': 10**6, 'g': 10**9, 't': 10**12}
_UNITS |= {u + 'i': 1024**n for n, u in enumerate(('', *'kmgt')) if u}


def parse_bytes(text: str | int | None, name: str = 'size') -> int | None:
  """Reads a size: `16GiB`, `1.5 GB`, `800M`, a number of bytes, or None.

  Raises:
    InputError: the text is no size, or is not positive; says which, by `name`.
  """
  if text is None or text == '':
    return None
  match = re.fullmatch(
    r'\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*', str(text), re.IGNORECASE
  )
  unit = _UNITS.get(match[2].lower()) if match else None
  if match is None or unit is None:
    raise InputError(
      f"{name}: '{text}' is not a size; write one like 16GiB or 800MB"
    )
  if not (value := int(float(match[1]) * unit)):
    raise InputError(f"{name} must be positive, got '{text}'")
  return value


def format_bytes(count: float) -> str:
  """Writes a size in binary units: `1.50 GiB`."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if abs(count) < 1024 or unit == 'GiB':
      return f'{count:.0f} B' if unit == 'B' else f'{count:.2f} {unit}'
    count /= 1024
  raise AssertionError


def _refuse_unless(ok: bool, message: str) -> None:
  if not ok:
    raise InputError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A model of the OPT family; sizes in elements.

  Attributes:
    embed_size: width of the token table; where it differs from `hidden_size`
      the model projects in and out (OPT-350M).
    pre_layer_norm: normalise before each sub-layer, not after the residual.
    final_layer_norm: normalise before the head.
    bias: linear layers have biases.
    norm_affine: layer norms have scale and bias.
    max_positions: longest context, prompt and new tokens together.
    tied_head: the head multiplies by the token table.
    checkpoint_dtype: dtype that the checkpoint says it is stored in.
    bos_id, eos_id: -1 where the model has none. `pad_id` is masked wherever
      it stands, so that any id will do.
  """

  num_layers: int
  num_heads: int
  hidden_size: int
  ffn_size: int
  embed_size: int
  vocab_size: int = 50272
  max_positions: int = 2048
  activation: str = 'relu'
  pre_layer_norm: bool = True
  final_layer_norm: bool = True
  bias: bool = True
  norm_affine: bool = True
  tied_head: bool = True
  checkpoint_dtype: str = 'float16'
  bos_id: int = 2
  eos_id: int = 2
  pad_id: int = 1

  def __post_init__(self) -> None:
    for name in ('num_layers', 'num_heads', 'hidden_size', 'ffn_size'):
      _refuse_unless(
        getattr(self, name) > 0, f'{name} must be positive: {self}'
      )
    _refuse_unless(
      self.hidden_size % self.num_heads == 0,
      f'hidden_size {self.hidden_size} is not a multiple of num_heads '
      f'{self.num_heads}',
    )

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """One block of requests: B x K prompts of T tokens, `gen_len` new ones.

  `gen_len` 0 means scoring: a prefill that keeps no cache.
  """

  batch_size: int
  num_batches: int
  prompt_len: int
  gen_len: int

  def __post_init__(self) -> None:
    for name in ('batch_size', 'num_batches', 'prompt_len'):
      _refuse_unless(
        getattr(self, name) > 0,
        f'{name} must be at least 1, got {getattr(self, name)}',
      )
    _refuse_unless(
      self.gen_len >= 0, f'gen_len must not be negative, got {self.gen_len}'
    )

  @property
  def cache_len(self) -> int:
    """Rows S of the cache: the last token's keys are never needed."""
    return self.prompt_len + self.gen_len - 1 if self.gen_len > 1 else 0


@dataclasses.dataclass(frozen=True)
class Packing:
  """How the numbers of a tensor are stored: as they are, or in groups.

  A group of consecutive numbers keeps `bits` bits for each, and a scale and a
  minimum of 16 bits for all of them (docs/four_bits.md).

  Attributes:
    bits: 16 (as they are, whatever the dtype), 8 or 4.
    group_size: numbers in a group; more where it does not divide an axis.
  """

  bits: int = 16
  group_size: int = 64

  @property
  def packs(self) -> bool:
    return self.bits < 16

  def group(self, size: int) -> int:
    """Returns how many numbers of an axis of `size` share a scale.

    It is the smallest even divisor of `size` from `group_size` on, and at
    most twice that; an axis that is shorter is one group.

    Raises:
      InputError: there is none.
    """
    most = 2 * self.group_size
    for group in range(min(self.group_size, size), most + 1):
      if size % group == 0 and group % 2 == 0:
        return group
    raise InputError(
      f'no even group of {self.group_size} to {most} numbers divides {size}'
    )

  def row_bytes(self, size: int, itemsize: int) -> int:
    """Returns the bytes of `size` numbers of an axis."""
    if not self.packs:
      return size * itemsize
    return size * self.bits // 8 + 4 * (size // self.group(size))


UNPACKED = Packing()


@dataclasses.dataclass(frozen=True)
class Split:
  """Percentages of a class of tensors on device, host and disk."""

  device: float
  host: float
  disk: float

  def __post_init__(self) -> None:
    parts = dataclasses.astuple(self)
    _refuse_unless(
      all(0 <= p <= 100 for p in parts) and abs(sum(parts) - 100) < 1e-6,
      f'a split must be three percentages, none below 0, that sum to 100, got '
      f'{sum(parts):g} from ({", ".join(f"{p:g}" for p in parts)})',
    )

  @classmethod
  def parse(
    cls, value: 'str | Sequence[float] | Split | None', name: str
  ) -> 'Split | None':
    """Reads `20,80,0` or (20, 80, 0); None and '' mean not given.

    Raises:
      InputError: it is not three percentages that sum to 100; names `name`.
    """
    if value is None or value == '' or isinstance(value, Split):
      return value if isinstance(value, Split) else None
    parts = value.split(',') if isinstance(value, str) else value
    try:
      device, host, disk = (float(p) for p in parts)
    except (TypeError, ValueError):
      raise InputError(
        f'--{name} takes three percentages (device, host, disk) like '
        f"20,80,0, got '{value}'"
      ) from None
    try:
      return cls(device, host, disk)
    except InputError as e:
      raise InputError(f'--{name}: {e}') from None

  def __iter__(self):
    return iter(dataclasses.astuple(self))


CHOICES: dict[str, tuple] = {
  'weight_bits': (16, 8, 4),
  'cache_bits': (16, 8, 4),
  'group_size': (32, 64, 128),
  'rounding': ('search', 'minmax'),
}


def parse_bits(value: int | str | None, name: str) -> int | None:
  """Reads how many bits a number shall have; 'auto' is as if not given.

  Raises:
    InputError: it is not of CHOICES; names `name`.
  """
  if value is None or value == 'auto':
    return None
  for bits in CHOICES[name]:
    if str(value) == str(bits):
      return bits
  choices = ', '.join(map(str, CHOICES[name]))
  raise InputError(f"{name} must be one of {choices} or auto, got '{value}'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """How a block runs. A split that is None is filled as high up as it fits.

  Attributes:
    weights, cache, hidden: where each class of tensors lives.
    schedule: 'zigzag' (the paper's block schedule) or 'row' (its baseline).
    prefetch_depth: how many layer visits ahead weights are loaded, and how
      many cells ahead cache and hidden states are.
    overlap: False makes every load and store wait for its turn.
    attention: where decode attention reads the cache: 'device', or 'host'
      (computed by the CPU beside a host-resident cache); None leaves it open.
    weight_bits: 16, 8 or 4 bits for each number of the layers' matrices; None
      takes what a converted folder holds, else 16. `cache_bits` for keys and
      values; None is 16, unless loss is allowed.
    group_size: numbers that share a scale; None as above, else 64.
    rounding: how a group's range is chosen: 'search' for the one of least
      squared error, or 'minmax'; None as above, else 'search'.
  """

  weights: Split | None = None
  cache: Split | None = None
  hidden: Split | None = None
  schedule: str = 'zigzag'
  prefetch_depth: int = 2
  overlap: bool = True
  attention: str | None = 'device'
  weight_bits: int | None = None
  cache_bits: int | None = None
  group_size: int | None = None
  rounding: str | None = None

  def __post_init__(self) -> None:
    _refuse_unless(
      self.schedule in ('zigzag', 'row'),
      f"schedule must be 'zigzag' or 'row', got '{self.schedule}'",
    )
    _refuse_unless(
      self.attention in ('device', 'host', None),
      f"attention must be 'device' or 'host', got '{self.attention}'",
    )
    _refuse_unless(
      1 <= self.prefetch_depth <= 64,
      f'prefetch_depth must be between 1 and 64, got {self.prefetch_depth}',
    )
    for name, choices in CHOICES.items():
      value = getattr(self, name)
      _refuse_unless(
        (value in choices and isinstance(value, int | str)) or value is None,
        f'{name} must be one of {", ".join(map(str, choices))}, got {value!r}',
      )
    _refuse_unless(
      self.attention != 'host' or self.cache_bits in (None, 16),
      'attention=host needs cache_bits=16: the CPU would expand the whole '
      'cache for every token',
    )
    _refuse_unless(
      self.attention != 'host' or self.cache in (None, Split(0, 100, 0)),
      'attention=host reads the cache in host memory: give cache=0,100,0 or '
      'leave it out',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How one request is continued.

  Attributes:
    max_new_tokens: at most so many tokens are generated.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: then keep the smallest set whose probability reaches p.
    seed: of this request's own random stream. Requests that share a seed and
      a prompt get the same text; None takes the request's index.
    stop: strings that end the text; the text ends before the first of them.
    stop_token_ids: token ids that end the text; like eos, such an id is the
      last of the output's ids and leaves no trace in its text.
    ignore_eos: go on past the end-of-text token.
    truncate_prompt: drop a too long prompt's oldest tokens, all but a leading
      `</s>`, instead of refusing it.
  """

  max_new_tokens: int = 32
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int | None = None
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  truncate_prompt: bool = False

  def __post_init__(self) -> None:
    if isinstance(self.stop, str):
      object.__setattr__(self, 'stop', (self.stop,))
    self._check('max_new_tokens', Integral, lambda n: n >= 1)
    self._check('top_k', Integral, lambda k: k >= 0)
    self._check('temperature', Real, lambda t: 0 <= t < math.inf)
    self._check('top_p', Real, lambda p: 0 < p <= 1)
    for name in ('ignore_eos', 'truncate_prompt'):
      self._check(name, bool, lambda flag: True)
    if self.seed is not None:
      self._check('seed', Integral, lambda seed: seed >= 0)
    self._check('stop', (tuple, list), lambda s: all(_is_text(x) for x in s))
    self._check('stop_token_ids', (tuple, list), lambda s: all(map(_is_id, s)))
    object.__setattr__(self, 'stop', tuple(self.stop))
    object.__setattr__(self, 'stop_token_ids', tuple(self.stop_token_ids))

  def _check(self, name: str, kind: Any, ok: Callable[[Any], bool]) -> None:
    value = getattr(self, name)
    fits = isinstance(value, kind) and (
      kind is bool or not isinstance(value, bool)
    )
    _refuse_unless(
      fits and ok(value), f'{name} must be {_EXPECTED[name]}, got {value!r}'
    )


_EXPECTED = {
  'max_new_tokens': 'an integer of at least 1',
  'temperature': 'a number of at least 0',
  'top_k': 'an integer of at least 0',
  'top_p': 'a number above 0 and at most 1',
  'seed': 'an integer of at least 0',
  'stop': 'a string or a list of strings, none of them empty',
  'stop_token_ids': 'a list of token ids',
  'ignore_eos': 'true or false',
  'truncate_prompt': 'true or false',
}


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value)


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0
