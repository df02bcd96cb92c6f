"""What do four bits cost in accuracy, and what do they gain in bytes and time?

Parts: accuracy (the bundled model's held-out text), expansion (kernels on an
accelerator), speed (`flexjax bench` in a fresh process for each row). Each
appends to a table of its own beside this file.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import flexjax
from experiments import common
from flexjax.config import Packing
from flexjax.quant import groupwise

HERE = Path(__file__).parent
_PARTS = flags.DEFINE_list('parts', ['accuracy'], 'Which parts to run.')
_ROWS = flags.DEFINE_list('rows', None, 'Rows of them; default all.')
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_OUT = flags.DEFINE_string('out', str(HERE), 'Folder of the tables.')
_HELD_OUT = flags.DEFINE_string(
  'held_out', '.tiny/held_out.npy', 'Tokens, from 00_tiny_opt --stage=corpus.'
)
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'Of the accuracy runs.')
_REPEATS = flags.DEFINE_integer('repeats', 1, 'Runs of each row of speed.')
_TIMEOUT = flags.DEFINE_integer('timeout', 400, 'Seconds for a row of speed.')

ACCURACY = {
  '16 bits': {},
  'w8': {'weight_bits': 8},
  'w4': {'weight_bits': 4},
  'kv8': {'cache_bits': 8},
  'kv4': {'cache_bits': 4},
  'w8+kv8': {'weight_bits': 8, 'cache_bits': 8},
  'w4+kv8': {'weight_bits': 4, 'cache_bits': 8},
  'w4+kv4': {'weight_bits': 4, 'cache_bits': 4},
}
_BOS = 2

_STREAMED = ['--weights=0,100,0', '--cache=100,0,0', '--hidden=100,0,0']
_W4, _KV4 = ['--weight_bits=4'], ['--cache_bits=4']
_6_7B = ['--model=opt-6.7b', *common.HOST, '--batch_size=48', '--num_batches=2']
_30B = ['--model=opt-30b', *common.HOST, '--batch_size=24', '--num_batches=2']
SPEED = {
  '6.7b-host-48x2': _6_7B,
  '6.7b-host-48x2-w4': [*_6_7B, *_W4],
  '6.7b-host-48x2-kv4': [*_6_7B, *_KV4],
  '6.7b-host-48x2-w4-kv4': [*_6_7B, *_W4, *_KV4],
  '6.7b-device-72x1-w4-kv4': [
    '--model=opt-6.7b', *common.DEVICE, '--batch_size=72', *_W4, *_KV4,
  ],
  '30b-host-24x2': _30B,
  '30b-host-24x2-w4-kv4': [*_30B, *_W4, *_KV4],
  '30b-host-48x4-w4-kv4': [
    '--model=opt-30b', *common.HOST, '--batch_size=48', '--num_batches=4', *_W4,
    *_KV4,
  ],
  '30b-streamed-32x1-w4-kv4': [
    '--model=opt-30b', *_STREAMED, '--batch_size=32', *_W4, *_KV4,
  ],
}  # fmt: skip


def main(argv):
  del argv
  for part in _PARTS.value:
    {'accuracy': accuracy, 'expansion': expansion, 'speed': speed}[part]()


def wanted(rows):
  return [row for row in rows if not _ROWS.value or row in _ROWS.value]


def accuracy():
  """Perplexity of the held-out text, 1,023 tokens after a `</s>` at a time."""
  ids = np.load(_HELD_OUT.value)
  size = 1023
  texts = [
    [_BOS, *ids[n : n + size].tolist()] for n in range(0, len(ids), size)
  ]
  base = None
  for name in wanted(ACCURACY):
    bits = ACCURACY[name]
    for rounding in ('minmax', 'search') if bits else ('',):
      began = time.monotonic()
      with flexjax.load(
        dtype=_DTYPE.value, rounding=rounding or None, **bits
      ) as llm:
        scores = llm.score(texts)
      nll = -np.concatenate([s.logprobs[1:] for s in scores]).mean()
      base = nll if base is None else base
      fields = {
        'row': name,
        'rounding': rounding,
        'commit': _COMMIT.value,
        'perplexity': round(float(np.exp(nll)), 4),
        'nll': round(float(nll), 5),
        'loss_over_16_bits': round(float(nll - base), 5),
        'perplexity_over_16_bits_percent': round(
          100 * float(np.expm1(nll - base)), 3
        ),
        'tokens': sum(len(s.logprobs) - 1 for s in scores),
        'dtype': _DTYPE.value,
        'seconds': round(time.monotonic() - began, 1),
      }
      common.append(Path(_OUT.value, 'accuracy.csv'), fields)


def expansion():
  """Traffic of expanding a packed matrix, and rates of packing."""
  rng = np.random.default_rng(0)
  for bits in (4, 8):
    packing = Packing(bits, 64)
    for rows, size in ((7168, 28672), (28672, 7168)):
      width = packing.row_bytes(size, 2)
      packed = jax.device_put(rng.integers(0, 128, (rows, width), np.uint8))
      expand = jax.jit(
        lambda x, p=packing, n=size: groupwise.expand(x, p, n, jnp.bfloat16)
      )
      seconds = timed(expand, packed)
      report_kernel('expand', bits, rows, size, seconds, packed.nbytes)
  x = jax.device_put(rng.normal(size=(8192, 7168)).astype(jnp.bfloat16))
  for name, rounding in groupwise.ROUNDINGS.items():
    pack = jax.jit(lambda x, r=rounding: groupwise.pack(x, Packing(4), r))
    report_kernel(f'pack {name}', 4, *x.shape, timed(pack, x), pack(x).nbytes)


def report_kernel(kernel, bits, rows, size, seconds, packed):
  traffic = packed + 2 * rows * size
  fields = {
    'kernel': kernel,
    'commit': _COMMIT.value,
    'bits': bits,
    'rows': rows,
    'columns': size,
    'ms': round(1e3 * seconds, 4),
    'tb_per_s': round(traffic / seconds / 1e12, 3),
    'numbers_per_s': f'{rows * size / seconds:.3g}',
    'device': jax.devices()[0].device_kind,
  }
  common.append(Path(_OUT.value, 'expansion.csv'), fields)


def timed(function, argument, calls=20):
  """Seconds of a call: the best of five runs of `calls`."""
  jax.block_until_ready(function(argument))
  best = float('inf')
  for _ in range(5):
    began = time.perf_counter()
    out = [function(argument) for _ in range(calls)]
    jax.block_until_ready(out[-1])
    best = min(best, (time.perf_counter() - began) / calls)
    del out
  return best


def speed():
  for name in wanted(SPEED):
    arguments = [*SPEED[name], *common.SHAPE]
    for _ in range(_REPEATS.value):
      stats = common.bench(arguments, _TIMEOUT.value)
      fields = common.record(name, _COMMIT.value, arguments, stats)
      common.append(Path(_OUT.value, 'speed.csv'), fields)


if __name__ == '__main__':
  app.run(main)
