"""What the experiments share: a `flexjax bench` in a process of its own, and a
table that every run appends to."""

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LINK_BYTES_PER_S = 54e9  # a bare loop's rate, host to device, on an H200
# The shape and the budgets of every run on an accelerator.
SHAPE = ['--device_memory=16GiB', '--host_memory=110GiB', '--prompt_len=512']
SHAPE += ['--gen_len=32', '--random_weights', '--dtype=bfloat16']
_PRODUCTS = 20
STEPS = 32  # tokens of a run of that shape
HOST = ['--weights=0,100,0', '--cache=0,100,0', '--hidden=100,0,0']
DEVICE = ['--weights=100,0,0', '--cache=100,0,0', '--hidden=100,0,0']


def bench(arguments: Sequence[str], timeout: float = 500) -> dict[str, Any]:
  """Runs `flexjax bench` and returns its --stats.

  Raises:
    RuntimeError: it failed; with the end of what it said.
  """
  return _stats_of('bench', arguments, timeout)


def planned(arguments: Sequence[str], timeout: float = 500) -> dict[str, Any]:
  """Runs `flexjax plan` likewise: the accelerator is free again afterwards."""
  return _stats_of('plan', arguments, timeout)


def _stats_of(name: str, arguments: Sequence[str], timeout: float):
  with tempfile.TemporaryDirectory() as folder:
    stats = Path(folder) / 'stats.json'
    command = [sys.executable, '-m', 'flexjax', name, *arguments]
    done = subprocess.run(
      [*command, f'--stats={stats}'],
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(f'{" ".join(command)}: {done.stderr[-2000:]}')
    return json.loads(stats.read_text())


def record(
  row: str,
  commit: str,
  arguments: Sequence[str],
  stats: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the figures of a run of SHAPE, the link's bound beside."""
  down = stats['link_bytes']['host_to_device']
  gib = {tier: n / 2**30 for tier, n in stats['peak_bytes'].items()}
  return {
    'row': row,
    'commit': commit,
    'tokens_per_s': round(stats['throughput_tokens_per_s'], 2),
    'prefill_s': round(stats['prefill_seconds'], 3),
    'decode_step_s': round(stats['decode_seconds'] / (STEPS - 1), 4),
    'link_bound_step_s': round(down / STEPS / LINK_BYTES_PER_S, 4),
    'load_s': round(stats['load_seconds'], 1),
    'peak_device_gib': round(gib['device'], 2),
    'allocator_peak_gib': round(
      stats.get('allocator_peak_bytes', 0) / 2**30, 2
    ),
    'peak_host_gib': round(gib['host'], 2),
    'host_to_device_gb': round(down / 1e9, 2),
    'device_to_host_gb': round(stats['link_bytes']['device_to_host'] / 1e9, 2),
    'link_busy': round(stats['link_busy_fraction'], 3),
    'compilations': stats['compilations'],
    'arguments': ' '.join(arguments),
  }  # fmt: skip


def compare(
  row: str, commit: str, arguments: Sequence[str], stats: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what a run was expected to take beside what it took."""
  predicted = stats['predicted']
  rate = stats['throughput_tokens_per_s']
  fields: dict[str, Any] = {
    'row': row,
    'commit': commit,
    'tokens_per_s': round(rate, 3),
    'predicted_tokens_per_s': round(predicted['throughput_tokens_per_s'], 3),
    'ratio': round(predicted['throughput_tokens_per_s'] / rate, 3),
  }
  for phase in ('prefill', 'decode'):
    fields[f'{phase}_s'] = round(stats[f'{phase}_seconds'], 4)
    fields[f'predicted_{phase}_s'] = round(predicted[f'{phase}_seconds'], 4)
    fields[f'{phase}_bound_by'] = predicted['binding'].get(phase, '')
  for tier, nbytes in stats['peak_bytes'].items():
    fields[f'{tier}_bytes'] = nbytes
    fields[f'predicted_{tier}_bytes'] = predicted['peak_bytes'][tier]
  fields['planned_device_bytes'] = predicted['planned_bytes']['device']
  fields['allocator_bytes'] = stats.get('allocator_peak_bytes', 0)
  fields['arguments'] = ' '.join(arguments)
  return fields


def cpu_gflops() -> float:
  """Returns what the CPU's float32 products reach at this moment.

  Takes some 0.3 s. Where others share the cores it falls, by half and more,
  and rows are to be compared only where it is alike.
  """
  a, b = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
  a @ b
  began = time.perf_counter()
  for _ in range(_PRODUCTS):
    a @ b
  seconds = (time.perf_counter() - began) / _PRODUCTS
  return round(2 * 1024**3 / seconds / 1e9, 1)


def append(path: str | Path, fields: Mapping[str, Any]) -> None:
  """Adds a line to a table, and prints it."""
  print(json.dumps(fields), flush=True)
  path = Path(path)
  new = not path.exists()
  with open(path, 'a', newline='') as f:
    writer = csv.DictWriter(f, fields)
    if new:
      writer.writeheader()
    writer.writerow(fields)
