"""Which amounts of work are timed: few, because each is compiled for.

Everything else in `timing` knows how; only this module knows how much.
"""

import dataclasses

_MIB = 2**20
_KIB = 2**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
  """Amounts of work.

  Attributes:
    seconds: to spend on repeating one point.
    dtypes: in which layers are timed.
    widths, rows: D of MLP layers, and rows that go through them.
    prompts: H -> (B, N, T) of attention without a cache.
    caches: (B, N, S, H) of attention to a cache on the device;
      `host_caches` likewise on the CPU.
    matrix_rows: rows, of 2048 numbers, of packed matrices.
    new_rows: (B, N, T, H) of new rows that are packed, to `packed_bits`.
    written: (B, N, T, H) of new rows that are written.
    picked: rows of logits.
    link_bytes: of a transfer between host and device.
    disk_widths: D of layers whose weights are read from disk.
    disk_writes: bytes of a value that is written there.
    rewritten: bytes of keys, and of values, on disk that a row is written to.
    cold_bytes: on disk that reads take turns in: more than a cache holds.
    contending_bytes: of each transfer beside computing.
  """

  seconds: float
  dtypes: tuple[str, ...]
  widths: tuple[int, ...]
  rows: tuple[int, ...]
  prompts: dict[int, tuple[tuple[int, int, int], ...]]
  caches: tuple[tuple[int, int, int, int], ...]
  host_caches: tuple[tuple[int, int, int, int], ...] = ()
  matrix_rows: tuple[int, ...]
  packed_bits: tuple[int, ...] = (4, 8)
  new_rows: tuple[tuple[int, int, int, int], ...]
  written: tuple[tuple[int, int, int, int], ...]
  picked: tuple[int, ...]
  link_bytes: tuple[int, ...] = ()
  disk_widths: tuple[int, ...]
  disk_writes: tuple[int, ...]
  rewritten: tuple[int, ...] = (256 * _KIB, 2 * _MIB)
  cold_bytes: int
  contending_bytes: int


_CPU = Points(
  seconds=0.4,
  dtypes=('float32', 'bfloat16'),
  widths=(768, 2048, 4096),
  rows=(1, 4, 16, 64, 256, 2048),
  prompts={
    64: ((2, 12, 64), (16, 12, 64), (8, 12, 512)),
    128: ((2, 8, 64), (16, 8, 64), (8, 8, 512)),
  },
  caches=((1, 12, 128, 64), (4, 12, 256, 64), (32, 12, 512, 64)),
  matrix_rows=(512, 2048, 8192, 16384),
  new_rows=((16, 12, 1, 64), (8, 12, 64, 64), (16, 12, 256, 64)),
  written=((4, 12, 1, 64), (64, 12, 1, 64), (16, 12, 64, 64)),
  picked=(1, 16, 64),
  disk_widths=(256, 768, 2048),
  disk_writes=(_MIB, 16 * _MIB, 64 * _MIB),
  cold_bytes=1024 * _MIB,
  contending_bytes=64 * _MIB,
)
_GPU = Points(
  seconds=0.2,
  dtypes=('bfloat16',),
  widths=(768, 2048, 7168),
  # Up to three rows of 16 bits are computed as four.
  rows=(1, 16, 64, 256, 2048, 8192),
  prompts={
    64: ((8, 32, 64), (8, 32, 512)),
    128: ((8, 32, 64), (8, 32, 512), (4, 32, 2048)),
  },
  caches=((1, 32, 64, 128), (2, 32, 512, 128), (32, 32, 512, 128)),
  host_caches=((1, 32, 64, 128), (2, 32, 512, 128), (16, 32, 512, 128)),
  matrix_rows=(512, 8192, 32768),
  new_rows=((16, 32, 1, 128), (8, 32, 64, 128), (16, 32, 256, 128)),
  written=((16, 32, 1, 128), (64, 32, 1, 128), (16, 32, 64, 128)),
  picked=(1, 16, 64),
  link_bytes=(64 * _KIB, _MIB, 16 * _MIB, 128 * _MIB, 512 * _MIB),
  disk_widths=(256, 768, 2048),
  disk_writes=(_MIB, 16 * _MIB, 64 * _MIB),
  cold_bytes=1024 * _MIB,
  contending_bytes=64 * _MIB,
)
_QUICK_CPU = dataclasses.replace(
  _CPU,
  seconds=0.04,
  widths=(768, 2048),
  rows=(1, 16, 256),
  prompts={64: ((4, 12, 64), (2, 12, 512))},
  caches=((1, 12, 128, 64), (8, 12, 512, 64)),
  matrix_rows=(512, 4096),
  packed_bits=(4,),  # takes seconds to compile; 8 bits take about as long
  new_rows=((16, 12, 1, 64), (8, 12, 256, 64)),
  written=((16, 12, 1, 64), (8, 12, 64, 64)),
  picked=(1, 32),
  disk_widths=(256, 1024),
  disk_writes=(_MIB, 16 * _MIB),
  cold_bytes=256 * _MIB,
  contending_bytes=16 * _MIB,
)
_QUICK_GPU = dataclasses.replace(
  _GPU,
  seconds=0.05,
  widths=(2048, 7168),
  rows=(1, 64, 2048),
  prompts={128: ((8, 32, 64), (8, 32, 512))},
  caches=((1, 32, 64, 128), (16, 32, 512, 128)),
  host_caches=((1, 32, 64, 128), (4, 32, 512, 128)),
  matrix_rows=(2048, 16384),
  packed_bits=(4,),
  new_rows=((16, 32, 1, 128), (8, 32, 128, 128)),
  written=((16, 32, 1, 128), (8, 32, 64, 128)),
  picked=(1, 64),
  link_bytes=(64 * _KIB, 16 * _MIB, 128 * _MIB),
  disk_widths=(256, 1024),
  disk_writes=(_MIB, 16 * _MIB),
  cold_bytes=256 * _MIB,
)


def points(platform: str, quick: bool) -> Points:
  """Returns what is timed on 'cpu', or else on an accelerator."""
  if platform == 'cpu':
    return _QUICK_CPU if quick else _CPU
  return _QUICK_GPU if quick else _GPU
