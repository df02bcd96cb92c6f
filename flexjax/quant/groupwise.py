"""Groups of numbers as a few bits each, a scale and a minimum.

    number ~ code * scale + minimum,    code in 0 .. 2**bits - 1

A packed row (the last axis) is uint8: the codes of all groups, then their
scales, then their minima, 16 bits each. At 4 bits the codes of a group's first
half are the low nibbles of its bytes and those of its second half the high
ones, which expands several times as fast as neighbours sharing a byte.

Pure functions for the inside of a jit; docs/four_bits.md has the layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from flexjax.config import Packing


class Rounding(NamedTuple):
  """How a group's scale and minimum are chosen.

  Attributes:
    shrinks: parts of the group's own range that the choice starts from.
    rounds: least-squares refinements of each start; 0 keeps the range.
  """

  shrinks: tuple[float, ...]
  rounds: int


MINMAX = Rounding((1.0,), 0)
SEARCH = Rounding((1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 4)
_LARGEST_FLOAT16 = 65504.0
ROUNDINGS = {'minmax': MINMAX, 'search': SEARCH}


class Moments(NamedTuple):
  """What is known of the vectors that a row is multiplied by.

  Their second moment is taken as along @ along.T plus a diagonal.

  Attributes:
    squares: [size] mean square of each element, positive.
    along: [size, R] main directions, each as long as its part is large.
  """

  squares: Array
  along: Array


def pack(
  x: Array,
  packing: Packing,
  rounding: Rounding,
  moments: Moments | None = None,
) -> Array:
  """Packs the last axis: [..., size] -> uint8 [..., packing.row_bytes].

  With MINMAX the error is at most half a scale, and the scale a (2**bits -
  1)th of the group's range, both up to the rounding of scale and minimum to 16
  bits: float16 for float16 numbers, else bfloat16. A group of equal numbers is
  exact if these are 16-bit numbers of that type. With SEARCH and without
  `moments` a group's squared error is never larger than with MINMAX.

  Args:
    moments: for roundings that search: errors count by `squares`, and each
      group makes up for what the ones before it have done to products with
      `along`.
  """
  group = packing.group(x.shape[-1])
  kind = range_dtype(x.dtype)
  levels = 2**packing.bits - 1
  x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
  if len(rounding.shrinks) > 1:
    codes, scale, minimum = _search(x, moments, levels, rounding, kind)
  else:
    (shrink,), rounds = rounding
    scale, minimum = _ranges(x, 1.0, levels, shrink, rounds, kind)
    codes = _codes(x, _f32(scale), _f32(minimum), levels)
  codes = codes.astype(jnp.uint8)
  if packing.bits == 4:
    half = group // 2
    codes = codes[..., :half] | codes[..., half:] << 4
  parts = (codes, _bytes(scale), _bytes(minimum))
  return jnp.concatenate([p.reshape(*x.shape[:-2], -1) for p in parts], -1)


def expand(
  packed: Array,
  packing: Packing,
  size: int,
  dtype: DTypeLike,
  of: DTypeLike | None = None,
) -> Array:
  """Undoes `pack`: uint8 [..., row_bytes] -> [..., size] in `dtype`.

  `of` is the type of the numbers that were packed; `dtype` unless given.
  """
  group = packing.group(size)
  end = size * packing.bits // 8
  kind = range_dtype(dtype if of is None else of)
  tail = packed[..., end:].reshape(*packed.shape[:-1], 2, size // group, 2)
  tail = _f32(jax.lax.bitcast_convert_type(tail, kind))
  scale, minimum = tail[..., 0, :, None], tail[..., 1, :, None]
  codes = packed[..., :end].reshape(*packed.shape[:-1], size // group, -1)
  if packing.bits == 4:
    codes = jnp.concatenate([codes & 15, codes >> 4], -1)
  x = _f32(codes) * scale + minimum
  if jnp.dtype(dtype) == jnp.float16:  # a scale that was rounded up
    x = jnp.clip(x, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
  return x.astype(dtype).reshape(*packed.shape[:-1], size)


def _search(x, moments, levels: int, rounding: Rounding, kind: DTypeLike):
  """Returns codes, scale and minimum of x [..., groups, group].

  Groups come one after another. What those so far have added to the row's
  products with `along`, the next one's numbers are shifted against, as far as
  that is best for the expected square of the whole row's error.
  """
  groups, group = x.shape[-2:]
  if moments is None:
    moments = Moments(jnp.ones(groups * group), jnp.zeros((groups * group, 1)))
  weights = moments.squares.reshape(groups, group)
  along = moments.along.reshape(groups, group, -1)
  shifts = _shifts(weights, along)

  def one(added, given):
    x, weights, along, shifts = given
    # Sums, not matrix products: the same in every compilation.
    target = x - (added[..., None, :] * shifts).sum(-1)
    scale, minimum = _best(target, weights, levels, rounding, kind)
    codes = _codes(target, _f32(scale), _f32(minimum), levels)
    error = codes * _f32(scale) + _f32(minimum) - x
    added = added + (error[..., None] * along).sum(-2)
    return added, (codes, scale, minimum)

  added = jnp.zeros((*x.shape[:-2], along.shape[-1]))
  rows = (jnp.moveaxis(x, -2, 0), weights, along, shifts)
  _, found = jax.lax.scan(one, added, rows)
  return tuple(jnp.moveaxis(part, 0, -2) for part in found)


def _shifts(weights: Array, along: Array) -> Array:
  """[groups, group, R]: shift of a number by a unit of what has been added.

  With errors e done and those to come free, the minimum of
  e.T (diag(d) + along @ along.T) e has them at
  -along / d @ inverse(1 + along.T / d @ along) of what e adds, the sums going
  over what is to come.
  """
  d = jnp.maximum(weights - jnp.square(along).sum(-1), 0.01 * weights)
  scaled = along / d[..., None]
  each = exact_product('gir,gis->grs', scaled, along)
  to_come = jnp.cumsum(each[::-1], 0)[::-1]
  inverse = jnp.linalg.inv(jnp.eye(along.shape[-1]) + to_come)
  return exact_product('gir,grs->gis', scaled, inverse)


def _best(x, weights, levels: int, rounding: Rounding, kind: DTypeLike):
  """Returns scale and minimum [..., 1] of least weighted error."""

  def tried(shrink):
    return _ranges(x, weights, levels, shrink, rounding.rounds, kind)

  plain = _ranges(x, weights, levels, 1.0, 0, kind)
  others = jax.vmap(tried)(jnp.array(rounding.shrinks))
  scale, minimum = jax.tree.map(
    lambda a, b: jnp.concatenate([a[None], b]), plain, others
  )
  codes = _codes(x, _f32(scale), _f32(minimum), levels)
  squares = jnp.square(codes * _f32(scale) + _f32(minimum) - x)
  best = (weights * squares).sum(-1, keepdims=True).argmin(0)[None]
  return tuple(
    jnp.take_along_axis(part, best, 0)[0] for part in (scale, minimum)
  )


def _ranges(x, weights, levels: int, shrink, rounds: int, kind: DTypeLike):
  """Returns scale and minimum [..., 1] of x [..., group] from one start."""
  low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
  if not rounds:
    return (high / levels - low / levels).astype(kind), low.astype(kind)
  middle, half = low / 2 + high / 2, high / 2 - low / 2
  scale, minimum = half * (2 * shrink / levels), middle - half * shrink
  for _ in range(rounds):
    codes = _codes(x, scale, minimum, levels)
    scale, minimum = _fit(x, weights, codes, scale)
  return scale.astype(kind), minimum.astype(kind)


def _fit(x: Array, weights: Array | float, codes: Array, scale: Array):
  """Least-squares scale and minimum of x for given codes."""
  weights = jnp.broadcast_to(weights, x.shape[-1:])
  share = weights / weights.sum()

  def mean(y):
    return (share * y).sum(-1, keepdims=True)

  middle, at = mean(x), mean(codes)
  spread = mean(jnp.square(codes - at))
  along = mean((codes - at) * (x - middle))
  scale = jnp.where(spread > 0, along / jnp.where(spread > 0, spread, 1), scale)
  return scale, middle - scale * at


def _codes(x: Array, scale: Array, minimum: Array, levels: int) -> Array:
  """Nearest codes, still float32. Quarters, so that nothing overflows."""
  step = jnp.where(scale > 0, scale, 1) * 0.25
  return jnp.clip(jnp.rint((x * 0.25 - minimum * 0.25) / step), 0, levels)


def _bytes(x: Array) -> Array:
  """16-bit numbers [..., groups, 1] -> uint8 [..., groups, 2]."""
  return jax.lax.bitcast_convert_type(x[..., 0], jnp.uint8)


def exact_product(spec: str, a: Array, b: Array) -> Array:
  """An einsum in full float32, whatever precision products have otherwise."""
  a, b = _f32(a), _f32(b)
  return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def _f32(x: Array) -> Array:
  return x.astype(jnp.float32)


def range_dtype(dtype: DTypeLike) -> DTypeLike:
  """Returns the type of scales and minima of numbers of `dtype`."""
  return jnp.float16 if jnp.dtype(dtype) == jnp.float16 else jnp.bfloat16
