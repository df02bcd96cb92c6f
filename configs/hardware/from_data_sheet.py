"""Writes the records of machines that were not measured.

    PYTHONPATH=. python configs/hardware/from_data_sheet.py

A machine is a handful of rates from its data sheet. What flexjax reaches of
such rates was measured on an H200 (experiments/) and is taken to be the same
part everywhere; where a machine is known better, its row says so.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from flexjax import hardware
from flexjax.hardware import Curve, Family, Hardware

HERE = Path(__file__).parent
GIB = 2**30

# Parts of the data sheet's rates that an H200 reaches: 989 TFLOP/s, 4.8 TB/s,
# and PCIe 5 x16, 63 GB/s.
MATMUL = 0.78  # bfloat16, 8192^3: 770 TFLOP/s
WEIGHTS = 0.67  # a 7168x28672 matrix times 64 rows: 411 MB in 0.127 ms
CACHE = 0.76  # decode attention, bfloat16: 3.66 TB/s
EXPAND = {4: 0.66, 8: 0.48}  # 3.16 and 2.28 TB/s, 03_four_bits
PACK = 0.08  # min/max 1.2 TB/s; twice refined, as new rows are, a third of it
LINK = 0.80  # pinned memory, either way: 50.7 GB/s
HOST_ROWS = 0.45  # of what the link reaches: 352 MB x 2 in 30 ms, LOG.md

# Bytes/s of a float32 cache that each core beside an H200 attends to: 103 GB/s
# by 16 cores.
HOST = 6.4e9
HALVES = 0.8  # of as many numbers a second in bfloat16, experiment 10

# 32 TFLOP/s at head size 128, of 4 H FLOP a score; float32 scores pass through
# memory, so it goes with that: 0.6 bytes for each element of a head.
SCORE = 4 / 32e12 * 4.8e12

# Seconds.
LAUNCH = 20e-6  # of a layer's handful of kernels
LATENCY = 30e-6  # of a copy over PCIe
DISK_LATENCY = 200e-6  # of a TensorStore request, an estimate
HOST_ROW = 450e-6  # any row into pinned memory: 0.44-0.49 ms
HOST_CALL = 100e-6  # of a jitted function on the CPU backend
# Of H200s' hosts, calibrated.
DISPATCH = {'compute': 150e-6, 'read': 280e-6, 'write': 150e-6}

WIDTHS = (768, 2048, 4096, 12288)
HEADS = (64, 128)
ROWS = tuple(4.0**n for n in range(8))
BYTES = tuple(2.0**n for n in range(16, 31, 2))  # 64 KiB to 1 GiB
NUMBERS = BYTES
SCORES = tuple(4.0**n for n in range(9, 18))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """A machine in the figures of its data sheet.

  Attributes:
    device_memory, host_memory, disk_space: bytes that can be used.
    flops: peak of dense 16-bit products, accumulated in float32.
    reached: part of it that large products reach.
    memory: peak bytes/s of the device's memory.
    link: peak bytes/s of PCIe, one way.
    disk: bytes/s of reading and of writing.
    host_rate: bytes/s of a float32 cache that the CPU attends to.
  """

  name: str
  source: str
  platform: str
  dtype: str
  device_memory: int
  host_memory: int
  disk_space: int = 0
  flops: float
  reached: float = MATMUL
  memory: float
  link: float
  disk: tuple[float, float] = (0, 0)
  host_rate: float

  @property
  def record(self) -> Hardware:
    """The machine in seconds."""
    link = LINK * self.link
    links = {
      'host_to_device': _line(BYTES, LATENCY, link),
      'device_to_host': _line(BYTES, LATENCY, link),
    }
    if self.disk_space:
      read, write = self.disk
      links['disk_to_host'] = _line(BYTES, DISK_LATENCY, read)
      links['host_to_disk'] = _line(BYTES, DISK_LATENCY, write)
    return Hardware(
      name=self.name,
      source=f'{self.source} {COMMON}',
      platform=self.platform,
      unified=False,
      device_memory=self.device_memory,
      host_memory=self.host_memory,
      disk_space=self.disk_space,
      links=links,
      mlp={self.dtype: self._mlp()},
      prefill_attention={
        self.dtype: Family(
          tuple(
            (head, _line(SCORES, LAUNCH, self.memory / (SCORE * head)))
            for head in HEADS
          )
        )
      },
      decode_attention={self.dtype: _line(BYTES, LAUNCH, CACHE * self.memory)},
      host_attention={
        # What the CPU attends to in float16 is kept in float32.
        'float32': _line(BYTES, HOST_CALL, self.host_rate),
        'bfloat16': _line(BYTES, HOST_CALL, HALVES * self.host_rate / 2),
      },
      expand={
        str(bits): _line(NUMBERS, LAUNCH, part * self.memory / _moved(bits))
        for bits, part in EXPAND.items()
      },
      pack={
        str(bits): _line(NUMBERS, LAUNCH, PACK * self.memory / _moved(bits))
        for bits in EXPAND
      },
      row_write={
        # Rows are read and written, in pieces: half of what a cache gets.
        'device': _line(BYTES, LAUNCH, CACHE * self.memory / 4),
        'host': _line(BYTES, HOST_ROW, HOST_ROWS * link),
      },
      # Four passes over float32 logits, an estimate; sorting takes longer.
      pick=_line(NUMBERS, LAUNCH, CACHE * self.memory / 16),
      dispatch=DISPATCH,
      # What crosses the link passes through the device's memory.
      contention={
        name: float(f'{link / (CACHE * self.memory):.2g}')
        for name in ('host_to_device', 'device_to_host')
      },
    )

  def _mlp(self) -> Family:
    """A roofline: 16 M D^2 FLOP on 16 D^2 bytes of weights."""
    flops, memory = self.reached * self.flops, WEIGHTS * self.memory
    rows = sorted({*ROWS, float(round(flops / memory))})  # where it bends

    def seconds(width: int) -> Callable[[float], float]:
      work = 16 * width**2
      return lambda m: LAUNCH + max(work * m / flops, work / memory)

    return Family(tuple((d, _curve(rows, seconds(d))) for d in WIDTHS))


def _moved(bits: int) -> float:
  """Bytes a number takes packed in groups of 64, and in 16 bits."""
  return bits / 8 + 4 / 64 + 2


def _curve(
  amounts: Iterable[float], seconds: Callable[[float], float]
) -> Curve:
  return Curve(tuple((x, seconds(x)) for x in amounts))


def _line(amounts: Iterable[float], start: float, rate: float) -> Curve:
  return _curve(amounts, lambda x: start + x / rate)


COMMON = (
  'Curves: estimates by configs/hardware/from_data_sheet.py, which takes of '
  'these rates the parts that an H200 was measured to reach; dispatching is '
  "that of H200s' hosts; pack, pick, latencies and contention are estimates of "
  'their own.'
)

MACHINES = {
  't4': Machine(
    name='T4 16 GB, 208 GB host, 1.5 TB SSD',
    source=(
      'The machine of FlexGen (Sheng et al., 2023, arXiv 2303.06865): a '
      'cloud instance with 208 GB, of which its cost model plans 204 GiB; '
      'SSD of 2 GB/s read, 1 GB/s write (its evaluation setup). Data sheet '
      'of the T4: 65 TFLOP/s float16, 320 GB/s, PCIe 3 x16; no bfloat16. '
      "Products: 21.24 TFLOP/s, the constant of FlexGen's published cost "
      'model for prefill; the card is held at 70 W. The CPU: 0.0123 '
      'TFLOP/s there, at two bytes of a float32 cache for a FLOP. Copies: '
      'pinned and both ways alike; its constants of 4.82 and 0.97 GiB/s from '
      "the device are its own copies'."
    ),
    platform='gpu',
    dtype='float16',
    # The driver lists 15,360 MiB with ECC; a context takes about 0.4 GiB.
    device_memory=int(14.5 * GIB),
    host_memory=204 * GIB,
    disk_space=1_500_000_000_000,
    flops=65e12,
    reached=21.24 / 65,
    memory=320e9,  # 233.6 GB/s of it in device-to-device copies, 73 %
    link=15.75e9,  # 12.6 reached; FlexGen's fit is 12.89 GiB/s = 13.8 GB/s
    disk=(2e9, 1e9),
    host_rate=24.6e9,
  ),
  'rtx3090': Machine(
    name='RTX 3090 24 GB, 128 GB host, 1 TB NVMe',
    source=(
      "NVIDIA's GA102 whitepaper: 71 TFLOP/s of 16-bit products accumulated "
      'in float32, 936 GB/s, PCIe 4 x16. The rest is an assumed desktop: 128 '
      'GB, twelve cores with two channels of DDR4-3200, and a 1 TB NVMe '
      'drive of 3.5 GB/s read, 2.5 GB/s write.'
    ),
    platform='gpu',
    dtype='bfloat16',
    device_memory=23 * GIB,  # beside a context and a screen
    host_memory=120 * GIB,
    disk_space=900_000_000_000,
    flops=71e12,
    memory=936e9,
    link=31.5e9,
    disk=(3.5e9, 2.5e9),
    host_rate=40e9,  # of the 51 GB/s of two channels of DDR4-3200
  ),
  'a100-40gb': Machine(
    name='A100 40 GB, 85 GB host, 1.5 TB SSD',
    source=(
      "NVIDIA's A100 data sheet: 312 TFLOP/s bfloat16 dense, 1,555 GB/s, "
      "PCIe 4 x16. Host: Google Cloud's a2-highgpu-1g, 12 vCPU and 85 GB; "
      'its cores are taken to attend as fast as those beside an H200. Disk: '
      'four local SSD of 375 GB, at the 2 and 1 GB/s that FlexGen states for '
      'as much space.'
    ),
    platform='gpu',
    dtype='bfloat16',
    device_memory=39 * GIB,
    host_memory=78 * GIB,
    disk_space=1_500_000_000_000,
    flops=312e12,
    memory=1555e9,
    link=31.5e9,
    disk=(2e9, 1e9),
    host_rate=6 * HOST,
  ),
  'tpu-v5e': Machine(
    name='TPU v5e, one chip, 48 GB host',
    source=(
      "Google's page on TPU v5e: 197 TFLOP/s bfloat16, 16 GB at 819 GB/s. "
      'Host: ct5lp-hightpu-1t, 24 vCPU and 48 GB, of which some 42 GiB are '
      'to be had, no local disk; its cores are taken to attend as fast as '
      'those beside an H200. The link is not documented: 15 GB/s, the PCIe '
      "rate that 'How to Scale Your Model' computes with. Nothing of it was "
      'measured with flexjax on a TPU.'
    ),
    platform='tpu',
    dtype='bfloat16',
    device_memory=int(15.5 * GIB),  # XLA allots 15.75 GiB
    host_memory=42 * GIB,
    flops=197e12,
    memory=819e9,
    link=15e9,
    host_rate=12 * HOST,
  ),
}


def main(folder: Path = HERE) -> None:
  for name, machine in MACHINES.items():
    hardware.write(folder / f'{name}.json', machine.record)


if __name__ == '__main__':
  main()
