"""What XLA makes several passes of, each as one kernel for a GPU (Pallas).

Attention reads a 4-bit cache as it is stored, instead of expanding it first;
new rows are packed while they are in registers. `groupwise` says the same in
plain JAX, for every other device and shape, and is what these are tested
against.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from flexjax.config import Packing
from flexjax.quant import groupwise
from flexjax.quant.groupwise import Rounding

try:
  from jax.experimental.pallas import triton
except ImportError:  # deprecated: a later JAX may not have it
  triton = None  # type: ignore[assignment]

MASKED = -1e30  # finite: a prompt that is all padding must not become NaN
_ROWS = 32  # of a cache that a program attends to at a time
_LEAST_PROGRAMS = 1024  # which keep a large GPU busy
_LEAST_COLUMNS = 128  # of a cache that are worth a program of their own
_PACKED_ROWS = 32  # that a program packs


class Attended(NamedTuple):
  """Part of a softmax: what queries found in some of their keys.

  Attributes:
    values: float32 [B, N, H], values weighted by exp(score - top).
    weight: float32 [B, N], the sum of these weights.
    top: float32 [B, N], no less than any of the scores.
  """

  values: Array
  weight: Array
  top: Array


def fits(packing: Packing, head_size: int) -> bool:
  """Whether there are kernels for rows of `head_size` numbers, so packed."""
  if packing.bits != 4 or triton is None:
    return False
  group = packing.group(head_size)
  # Triton's blocks are powers of two.
  return all(n & (n - 1) == 0 for n in (group, head_size)) and group >= 4


def attend(
  q: Array,
  k: Array,
  v: Array,
  bias: Array,
  packing: Packing,
  kind: DTypeLike,
  *,
  interpret: bool = False,
) -> Attended:
  """One query per head attends to packed keys and values.

  Args:
    q: queries float32 [B, N, H], already scaled.
    k, v: uint8 [B, N, S, row_bytes], as `groupwise.pack` makes them.
    bias: float32 [B, N or 1, S], added to the scores; `MASKED` where nothing
      is to be seen.
    kind: of what was packed.
    interpret: on any device, slowly.
  """
  b, n, columns, _ = k.shape
  size = q.shape[-1]
  most = pl.cdiv(columns, _LEAST_COLUMNS)
  splits = max(1, min(most, _LEAST_PROGRAMS // (b * n)))
  kind = groupwise.range_dtype(kind)
  span = pl.cdiv(pl.cdiv(columns, splits), _ROWS) * _ROWS
  splits = pl.cdiv(columns, span)
  heads = bias.shape[1]

  def head(*shape):
    return pl.BlockSpec((None, None, *shape), lambda b, n, s: (b, n, 0, 0))

  def part(*shape):
    return pl.BlockSpec(
      (None, None, None, *shape),
      lambda b, n, s: (b, n, s, *(0 for _ in shape)),
    )

  values, weight, top = pl.pallas_call(
    functools.partial(
      _attend, columns=columns, span=span, packing=packing, kind=kind
    ),
    grid=(b, n, splits),
    in_specs=[
      pl.BlockSpec((None, None, size), lambda b, n, s: (b, n, 0)),
      head(columns, k.shape[-1]),
      head(columns, k.shape[-1]),
      pl.BlockSpec(
        (None, None, columns), lambda b, n, s: (b, n if heads > 1 else 0, 0)
      ),
    ],
    out_specs=[part(size), part(), part()],
    out_shape=[
      jax.ShapeDtypeStruct((b, n, splits, *shape), jnp.float32)
      for shape in ((size,), (), ())
    ],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name='attend_packed',
  )(q, k, v, bias)
  highest = top.max(-1)
  part_of = jnp.exp(top - highest[..., None])
  return Attended(
    (values * part_of[..., None]).sum(2), (weight * part_of).sum(2), highest
  )


def _attend(
  q_ref, k_ref, v_ref, bias_ref, values_ref, weight_ref, top_ref, **about
):
  """A head's query and a span of its columns.

  Every row of a chunk has a softmax of its own, which spares a reduction per
  chunk; they become one at the end. A key is sum over groups of
  scale * codes + minimum, and so are its product with a query and the sum of
  weighted values.
  """
  columns, span = about['columns'], about['span']
  packing, kind = about['packing'], about['kind']
  size = q_ref.shape[-1]
  group = packing.group(size)
  half, groups = group // 2, size // group
  parts = [(g, g * half, g * group) for g in range(groups)]
  queries = [
    (
      triton.load(q_ref.at[pl.ds(at, half)]),
      triton.load(q_ref.at[pl.ds(at + half, half)]),
    )
    for _, _, at in parts
  ]
  sums = [low.sum() + high.sum() for low, high in queries]
  begin = pl.program_id(2) * span

  def chunk(c, carry):
    top, weight, values = carry
    first = begin + c * _ROWS
    there = first + jnp.arange(_ROWS) < columns
    rows = pl.ds(first, _ROWS)
    score = triton.load(bias_ref.at[rows], mask=there, other=MASKED)
    load = functools.partial(_codes, rows=rows, there=there, half=half)
    scales, minima = _ranges(k_ref, rows, there, size, groups, kind)
    for (g, at, _), (low, high) in zip(parts, queries, strict=True):
      codes_low, codes_high = load(k_ref, at=at)
      product = (codes_low * low + codes_high * high).sum(1)
      score += scales[g] * product + minima[g] * sums[g]
    new = jnp.maximum(top, score)
    keep, mine = jnp.exp(top - new), jnp.exp(score - new)
    weight = weight * keep + mine
    scales, minima = _ranges(v_ref, rows, there, size, groups, kind)
    found = []
    for g, at, _ in parts:
      by_code, by_minimum = (mine * scales[g])[:, None], (mine * minima[g])
      found += [
        old * keep[:, None] + by_code * codes + by_minimum[:, None]
        for old, codes in zip(
          values[2 * g : 2 * g + 2], load(v_ref, at=at), strict=True
        )
      ]
    return new, weight, tuple(found)

  start = (
    jnp.full((_ROWS,), MASKED, jnp.float32),
    jnp.zeros((_ROWS,), jnp.float32),
    tuple(jnp.zeros((_ROWS, half), jnp.float32) for _ in range(2 * groups)),
  )
  chunks = pl.cdiv(jnp.minimum(span, columns - begin), _ROWS)
  top, weight, values = jax.lax.fori_loop(0, chunks, chunk, start)
  highest = top.max()
  part_of = jnp.exp(top - highest)
  for n, value in enumerate(values):
    triton.store(
      values_ref.at[pl.ds(n * half, half)], (value * part_of[:, None]).sum(0)
    )
  weight_ref[...] = (weight * part_of).sum()
  top_ref[...] = highest


def _codes(ref, *, rows, there, half: int, at: int):
  """Codes [rows, half] of a group's first half, and of its second."""
  both = triton.load(
    ref.at[rows, pl.ds(at, half)], mask=there[:, None], other=0
  ).astype(jnp.int32)
  return (both & 15).astype(jnp.float32), (both >> 4).astype(jnp.float32)


def _ranges(ref, rows, there, size: int, groups: int, kind: DTypeLike):
  """Scales and minima of every group, float32 [rows] each."""
  tail = triton.load(
    ref.at[rows, pl.ds(size // 2, 4 * groups)], mask=there[:, None], other=0
  ).astype(jnp.int32)
  place = jnp.arange(4 * groups)

  def number(n):
    # Little-endian: the second byte is worth 256 times the first.
    worth = jnp.where(place == 2 * n, 1, jnp.where(place == 2 * n + 1, 256, 0))
    bits = (tail * worth[None]).sum(1)
    if jnp.dtype(kind) == jnp.bfloat16:
      return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    half = jax.lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)
    return half.astype(jnp.float32)

  return (
    [number(g) for g in range(groups)],
    [number(groups + g) for g in range(groups)],
  )


def pack(
  x: Array,
  packing: Packing,
  rounding: Rounding,
  *,
  interpret: bool = False,
) -> Array:
  """What `groupwise.pack` does: [..., H] -> uint8 [..., row_bytes].

  Args:
    rounding: one that starts from the group's own range.
    interpret: on any device, slowly.
  """
  (shrink,), rounds = rounding
  assert shrink == 1
  size = x.shape[-1]
  flat = x.reshape(-1, size)
  count, row = len(flat), packing.row_bytes(size, 2)
  packed = pl.pallas_call(
    functools.partial(_pack, count=count, packing=packing, rounds=rounds),
    grid=(pl.cdiv(count, _PACKED_ROWS),),
    in_specs=[pl.BlockSpec(flat.shape, lambda n: (0, 0))],
    out_specs=pl.BlockSpec((count, row), lambda n: (0, 0)),
    out_shape=jax.ShapeDtypeStruct((count, row), jnp.uint8),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name='pack_rows',
  )(flat)
  return packed.reshape(*x.shape[:-1], row)


def _pack(x_ref, out_ref, *, count: int, packing: Packing, rounds: int):
  size = x_ref.shape[-1]
  kind = groupwise.range_dtype(x_ref.dtype)
  group = packing.group(size)
  half, groups, end = group // 2, size // group, size // 2
  first = pl.program_id(0) * _PACKED_ROWS
  rows = pl.ds(first, _PACKED_ROWS)
  there = first + jnp.arange(_PACKED_ROWS) < count
  for g in range(groups):
    low, high = (
      triton.load(
        x_ref.at[rows, pl.ds(g * group + at, half)],
        mask=there[:, None],
        other=0,
      ).astype(jnp.float32)
      for at in (0, half)
    )
    scale, minimum = _range(low, high, rounds)
    scale, minimum = scale.astype(kind), minimum.astype(kind)
    exact = scale.astype(jnp.float32), minimum.astype(jnp.float32)
    codes = [_nearest(x, *exact).astype(jnp.int32) for x in (low, high)]
    triton.store(
      out_ref.at[rows, pl.ds(g * half, half)],
      (codes[0] | codes[1] << 4).astype(jnp.uint8),
      mask=there[:, None],
    )
    for at, number in ((2 * g, scale), (2 * (groups + g), minimum)):
      bits = jax.lax.bitcast_convert_type(number, jnp.int16).astype(jnp.int32)
      for n in range(2):
        byte = (bits >> (8 * n)) & 255
        where = out_ref.at[rows, pl.ds(end + at + n, 1)]
        triton.store(
          where, byte.astype(jnp.uint8)[:, None], mask=there[:, None]
        )


def _range(low: Array, high: Array, rounds: int) -> tuple[Array, Array]:
  """Scale and minimum [rows] of groups whose halves are `low` and `high`."""
  least = jnp.minimum(low.min(1), high.min(1))
  most = jnp.maximum(low.max(1), high.max(1))
  if not rounds:
    return most / 15 - least / 15, least
  middle, reach = least / 2 + most / 2, most / 2 - least / 2
  scale, minimum = reach * (2 / 15), middle - reach
  for _ in range(rounds):
    scale, minimum = _fit(low, high, scale, minimum)
  return scale, minimum


def _fit(low: Array, high: Array, scale: Array, minimum: Array):
  """Least-squares scale and minimum for the codes that these would give."""
  codes = [_nearest(x, scale, minimum) for x in (low, high)]
  count = 2 * low.shape[1]

  def mean(a: Array, b: Array) -> Array:
    return ((a + b).sum(1) / count)[:, None]

  middle, at = mean(low, high), mean(*codes)
  near = [code - at for code in codes]
  spread = mean(near[0] * near[0], near[1] * near[1])[:, 0]
  along = mean(near[0] * (low - middle), near[1] * (high - middle))[:, 0]
  scale = jnp.where(spread > 0, along / jnp.where(spread > 0, spread, 1), scale)
  return scale, middle[:, 0] - scale * at[:, 0]


def _nearest(x: Array, scale: Array, minimum: Array) -> Array:
  step = jnp.where(scale > 0, scale, 1) * 0.25
  code = (x * 0.25 - minimum[:, None] * 0.25) / step[:, None]
  # Halves to even, as jnp.rint does, which Triton lacks.
  below = jnp.floor(code)
  rest = code - below
  odd = below - 2 * jnp.floor(below / 2)
  up = (rest > 0.5) | ((rest == 0.5) & (odd == 1))
  return jnp.clip(jnp.where(up, below + 1, below), 0, 15)
