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
    rounds: least-squares refinements of each start.
  """

  shrinks: tuple[float, ...]
  rounds: int


MINMAX = Rounding((1.0,), 0)
SEARCH = Rounding((1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 4)
ROUNDINGS = {'minmax': MINMAX, 'search': SEARCH}


def pack(
  x: Array,
  packing: Packing,
  rounding: Rounding,
  importance: Array | None = None,
) -> Array:
  """Packs the last axis: [..., size] -> uint8 [..., packing.row_bytes].

  With one start and no refinement (MINMAX) the error is at most half a scale,
  and the scale a (2**bits - 1)th of the group's range, both up to the rounding
  of scale and minimum to 16 bits: float16 for float16 numbers, else bfloat16.
  With more, the squared error of a group is never larger than with one. A
  group of equal numbers is exact if these are 16-bit numbers of that type.

  Args:
    importance: [size] positive weights of the squared errors; None for equal
      ones.
  """
  group = packing.group(x.shape[-1])
  kind = _kind(x.dtype)
  levels = 2**packing.bits - 1
  x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
  weights = jnp.ones(1) if importance is None else importance
  weights = weights.astype(jnp.float32).reshape(-1, min(weights.size, group))
  scale, minimum = _choose(x, weights, levels, rounding, kind)
  codes = _codes(x, _f32(scale), _f32(minimum), levels).astype(jnp.uint8)
  if packing.bits == 4:
    half = group // 2
    codes = codes[..., :half] | codes[..., half:] << 4
  parts = (codes, _bytes(scale), _bytes(minimum))
  return jnp.concatenate([p.reshape(*x.shape[:-2], -1) for p in parts], -1)


def expand(
  packed: Array, packing: Packing, size: int, dtype: DTypeLike
) -> Array:
  """Undoes `pack`: uint8 [..., row_bytes] -> [..., size] in `dtype`."""
  group = packing.group(size)
  end = size * packing.bits // 8
  kind = _kind(dtype)
  tail = packed[..., end:].reshape(*packed.shape[:-1], 2, size // group, 2)
  tail = _f32(jax.lax.bitcast_convert_type(tail, kind))
  scale, minimum = tail[..., 0, :, None], tail[..., 1, :, None]
  codes = packed[..., :end].reshape(*packed.shape[:-1], size // group, -1)
  if packing.bits == 4:
    codes = jnp.concatenate([codes & 15, codes >> 4], -1)
  x = _f32(codes) * scale + minimum
  return x.astype(dtype).reshape(*packed.shape[:-1], size)


def _choose(
  x: Array,
  weights: Array,
  levels: int,
  rounding: Rounding,
  kind: DTypeLike,
):
  """Returns scale and minimum [..., groups, 1] of x [..., groups, group]."""
  weights = jnp.broadcast_to(weights, x.shape[-2:])
  low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
  middle, half = low / 2 + high / 2, high / 2 - low / 2

  def start(shrink):
    scale, minimum = half * (2 * shrink / levels), middle - half * shrink
    for _ in range(rounding.rounds):
      codes = _codes(x, scale, minimum, levels)
      scale, minimum = _fit(x, weights, codes, scale)
    return scale.astype(kind), minimum.astype(kind)

  # Not by `start`: the minimum itself, which the middle would round.
  plain = ((high / levels - low / levels).astype(kind), low.astype(kind))
  if rounding == MINMAX:
    return plain
  if len(rounding.shrinks) == 1:
    return start(rounding.shrinks[0])

  def error(choice):
    scale, minimum = map(_f32, choice)
    codes = _codes(x, scale, minimum, levels)
    squares = jnp.square(codes * scale + minimum - x)
    return (weights * squares).sum(-1, keepdims=True)

  def better(best, shrink):
    new = start(shrink)
    new = (error(new), *new)
    take = new[0] < best[0]
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, best), None

  best = (error(plain), *plain)
  (_, scale, minimum), _ = jax.lax.scan(
    better, best, jnp.array(rounding.shrinks)
  )
  return scale, minimum


def _fit(x: Array, weights: Array, codes: Array, scale: Array):
  """Least-squares scale and minimum of x for given codes."""
  share = weights / weights.sum(-1, keepdims=True)

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


def _f32(x: Array) -> Array:
  return x.astype(jnp.float32)


def _kind(dtype: DTypeLike) -> DTypeLike:
  """The type of scales and minima of numbers of `dtype`."""
  return jnp.float16 if jnp.dtype(dtype) == jnp.float16 else jnp.bfloat16
