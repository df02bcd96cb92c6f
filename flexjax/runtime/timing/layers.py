"""Times what layers are made of, by the functions that the engine calls."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from flexjax.config import UNPACKED, ModelConfig, Packing
from flexjax.hardware import Curve, Family, rising
from flexjax.models import attention, opt
from flexjax.policy.charges import computed_scores
from flexjax.quant import keys
from flexjax.runtime import devices, sampling
from flexjax.runtime.codec import Codec
from flexjax.runtime.compute import Compute
from flexjax.runtime.timing.points import Points
from flexjax.runtime.timing.stopwatch import Stopwatch

_PROMPT = 256  # columns of hidden states from that many rows on
_MLP_GROUP = 3  # the weight group of the first MLP layer
_PACKED_WIDTH = 2048  # numbers in a row of packed matrices
_VOCAB = 50272
# Packed tensors are expanded to, and rows packed from, 16-bit numbers.
_PACKED_DTYPE = 'bfloat16'


def mlp(watch: Stopwatch, points: Points) -> dict[str, Family]:
  """dtype -> width -> rows -> seconds of an MLP layer."""
  return {
    dtype: Family(
      tuple(
        (width, _mlp_curve(watch, points, dtype, width))
        for n, width in enumerate(points.widths)
        if not n or 2 * _mlp_bytes(width, dtype) <= watch.room
      )
    )
    for dtype in points.dtypes
  }


def _mlp_curve(
  watch: Stopwatch, points: Points, dtype: str, width: int
) -> Curve:
  call = mlp_layer(watch, dtype, width)
  room = watch.room - _mlp_bytes(width, dtype)
  found = []
  for n, rows in enumerate(points.rows):
    # Inner activations, in float32 and in the compute type.
    if not n or 2 * rows * 4 * width * 4 <= room:
      found.append((rows, watch.on_device(call(rows))))
  return rising(found)


def mlp_layer(
  watch: Stopwatch, dtype: str, width: int
) -> Callable[[int], Callable[[int], Array]]:
  """Returns a function from rows to a call that runs an MLP layer on them."""
  model = config(width)
  compute = _compute(watch, model, dtype)
  copies = watch.copies(_mlp_bytes(width, dtype))
  shapes = opt.weight_groups(model)[_MLP_GROUP]
  weights = [
    {name: watch.numbers(shape, dtype) for name, shape in shapes.items()}
    for _ in range(copies)
  ]

  def of(rows: int) -> Callable[[int], Array]:
    batch, columns = rows, 1
    if rows >= _PROMPT:
      batch, columns = rows // _PROMPT, _PROMPT
    hidden = watch.numbers((batch, columns, width), dtype)
    start, position = watch.integers([0] * batch), watch.integers(0)

    def call(n: int) -> Array:
      now = weights[n % copies]
      return compute.layer('mlp', now, hidden, None, start, position)[0]

    return call

  return of


def _mlp_bytes(width: int, dtype: str) -> int:
  return 8 * width * width * jnp.dtype(dtype).itemsize


def prefill_attention(watch: Stopwatch, points: Points) -> dict[str, Family]:
  """dtype -> head size -> computed scores -> seconds."""
  attend = jax.jit(
    functools.partial(attention.attend, fused=watch.machine.fused)
  )

  def one(dtype: str, b: int, n: int, t: int, h: int) -> tuple[int, float]:
    q, k, v = (watch.numbers((b, n, t, h), dtype) for _ in range(3))
    start, position = watch.integers([0] * b), watch.integers(0)
    seconds = watch.on_device(
      lambda _: attend(q, {'k': k, 'v': v}, None, start, position)
    )
    return b * n * computed_scores(t), seconds

  return {
    dtype: Family(
      tuple(
        (h, rising(one(dtype, *size, h) for size in sizes))
        for h, sizes in points.prompts.items()
      )
    )
    for dtype in points.dtypes
  }


def decode_attention(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """dtype -> bytes of cache on the device -> seconds; '4' likewise, where the
  device attends to a packed cache as it is."""
  home = watch.machine.device
  curves = {
    dtype: _decode_curve(watch, dtype, points.caches, home, watch.on_device)
    for dtype in points.dtypes
  }
  if watch.machine.fused:
    curves['4'] = _packed_curve(watch, points)
  return curves


def _packed_curve(watch: Stopwatch, points: Points) -> Curve:
  packing = Packing(4)
  found = []
  for first, (b, n, s, h) in enumerate(points.caches):
    row = packing.row_bytes(h, 2)
    nbytes = 2 * b * n * s * row
    if first and nbytes > watch.room:
      continue
    model = config(n * h, n)
    codec = Codec(model, _PACKED_DTYPE, UNPACKED, packing, fused=True)
    codes = _packed(b * n * s, packing, h).reshape(b, n, s, row)
    caches = [
      jax.device_put({'k': codes, 'v': codes}, watch.machine.device)
      for _ in range(watch.copies(nbytes))
    ]
    q = watch.numbers((b, n, 1, h), _PACKED_DTYPE)
    waves = watch.numbers((n, h, keys.TERMS), 'float32')
    start, position = watch.integers([0] * b), watch.integers(s)
    attend = jax.jit(codec.attend)

    def call(
      turn, attend=attend, q=q, caches=caches, waves=waves, at=(start, position)
    ):
      return attend(q, caches[turn % len(caches)], waves, *at)

    found.append((nbytes, watch.on_device(call)))
  return rising(found)


def host_attention(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """dtype -> bytes of cache in host memory -> seconds on the CPU, with the way
  there and back that the engine takes."""
  if watch.machine.unified:
    return {}
  home = watch.machine.cpu
  return {
    dtype: _decode_curve(
      watch, dtype, points.host_caches, home, watch.wall, points.dtypes[0]
    )
    for dtype in devices.ATTENDED
  }


def _decode_curve(
  watch: Stopwatch,
  dtype: str,
  sizes,
  home: Sharding,
  clock,
  queries: str | None = None,
) -> Curve:
  """`queries` are the dtype of queries and rows that come from the device and
  go back to it; None where they are where the cache is."""
  attend, machine = jax.jit(attention.attend), watch.machine
  there = machine.device if queries else home
  found = []
  for first, (b, n, s, h) in enumerate(sizes):
    nbytes = 2 * math.prod((b, n, s, h)) * jnp.dtype(dtype).itemsize
    if first and nbytes > watch.room:
      continue
    caches = [
      {name: watch.numbers((b, n, s, h), dtype, home) for name in 'kv'}
      for _ in range(watch.copies(nbytes))
    ]
    q = watch.numbers((b, n, 1, h), queries or dtype, there)
    start = watch.integers([0] * b, home)
    position = watch.integers(s, home)

    def call(turn, q=q, caches=caches, start=start, position=position):
      cache, near = caches[turn % len(caches)], (q, q)
      if there != home:
        near = jax.device_put(jax.device_put(near, machine.pinned), home)
      x = attend(near[0], {'k': near[1], 'v': near[1]}, cache, start, position)
      return x if there == home else jax.device_put(x, there)

    found.append((nbytes, clock(call)))
  return rising(found)


def expand(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """bits -> numbers of a packed matrix -> seconds until it is expanded."""
  return {str(bits): _expand_curve(watch, points, bits) for bits in (4, 8)}


def _expand_curve(watch: Stopwatch, points: Points, bits: int) -> Curve:
  packing = Packing(bits)
  model = config(_PACKED_WIDTH)
  compute = _compute(watch, model, _PACKED_DTYPE, packing)
  found = []
  for rows in points.matrix_rows:
    packed = jax.device_put(_packed(rows, packing), watch.machine.device)

    def call(_, packed=packed):
      return compute.expand({'fc1': packed})

    found.append((rows * _PACKED_WIDTH, watch.on_device(call)))
  return rising(found)


def _packed(
  rows: int, packing: Packing, size: int = _PACKED_WIDTH
) -> np.ndarray:
  """Rows of `size` numbers: random codes, all scales and minima the same."""
  end = size * packing.bits // 8
  width = packing.row_bytes(size, 2)
  row = np.full(width // 2, 0.01, jnp.dtype(_PACKED_DTYPE)).view(np.uint8)
  row = np.resize(row, width)
  row[:end] = np.random.default_rng(0).integers(0, 256, end)
  return np.tile(row, (rows, 1))


def pack(watch: Stopwatch, points: Points) -> dict[str, Curve]:
  """bits -> numbers of new cache rows -> seconds until they are packed."""
  found = {b: _pack_curve(watch, points, b) for b in points.packed_bits}
  some = next(iter(found.values()))
  return {str(bits): found.get(bits, some) for bits in (4, 8)}


def _pack_curve(watch: Stopwatch, points: Points, bits: int) -> Curve:
  found = []
  for b, n, t, h in points.new_rows:
    model = config(n * h, n)
    codec = Codec(
      model,
      _PACKED_DTYPE,
      UNPACKED,
      Packing(bits),
      fused=watch.machine.fused,
    )
    rows = {name: watch.numbers((b, n, t, h), _PACKED_DTYPE) for name in 'kv'}
    waves = watch.numbers((n, h, keys.TERMS), 'float32')
    start, position = watch.integers([0] * b), watch.integers(0)
    function = jax.jit(codec.pack_rows)

    def call(
      _, function=function, rows=rows, waves=waves, start=start, at=position
    ):
      return function(rows, waves, start, at)

    found.append((2 * b * n * t * h, watch.on_device(call)))  # keys and values
  return rising(found)


def pick(watch: Stopwatch, points: Points) -> Curve:
  """Logits -> seconds to pick the likeliest tokens."""
  function = jax.jit(sampling.pick, static_argnames='mode')
  step = watch.integers(0)
  found = []
  for batch in points.picked:
    logits = watch.numbers((batch, _VOCAB), 'float32')
    rows = sampling.pack([None] * batch, np.arange(batch))
    params = jax.device_put(rows, watch.machine.device)

    def call(_, logits=logits, params=params):
      return function(logits, params, step, mode='greedy')

    found.append((batch * _VOCAB, watch.on_device(call)))
  return rising(found)


def config(width: int, heads: int | None = None) -> ModelConfig:
  """Returns a model of one layer."""
  return ModelConfig(
    num_layers=1,
    num_heads=heads or width // 64,
    hidden_size=width,
    ffn_size=4 * width,
    embed_size=width,
  )


def _compute(
  watch: Stopwatch,
  model: ModelConfig,
  dtype: str,
  packing: Packing = UNPACKED,
) -> Compute:
  codec = Codec(model, dtype, packing, UNPACKED)
  chunk_tokens = watch.machine.chunk_tokens
  return Compute(opt.layers(model, dtype), codec, chunk_tokens)
