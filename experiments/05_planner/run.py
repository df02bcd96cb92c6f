"""How far is the planner's pick from the best of a grid, and what does
throughput cost in latency?

`grid` measures the pick and every policy of a grid that fits, one process per
model: weights stay where they are while blocks and cache change. `curve`
measures plans of which none is both faster and shorter than another. A row is
one block; rows go to grid.csv and curve.csv.
"""

import dataclasses
import itertools
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments import common
from flexjax import hardware
from flexjax.config import Policy, SamplingParams, Split, parse_bytes
from flexjax.errors import InputError
from flexjax.runtime import devices, sources
from flexjax.runtime import planning as plans
from flexjax.runtime.llm import LLM
from flexjax.runtime.loaded import LoadedModel

HERE = Path(__file__).parent
_MACHINE = flags.DEFINE_enum('machine', 'cpu', ['cpu', 'h200'], 'Which grid.')
_PARTS = flags.DEFINE_list('parts', ['grid', 'curve'], 'grid, curve.')
_MODELS = flags.DEFINE_list('models', None, "Models; default the machine's.")
_MODEL = flags.DEFINE_string('model', None, 'One model, in this process.')
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_HARDWARE = flags.DEFINE_string('hardware', None, "The machine's record.")
_DEVICE = flags.DEFINE_string('device_memory', None, 'Default: by model.')
_HOST = flags.DEFINE_string('host_memory', None, 'Default: by model.')
_DISK = flags.DEFINE_string('disk_dir', '.planner', 'For grids with a disk.')
_PROMPTS = flags.DEFINE_integer('num_prompts', None, 'Default: by machine.')
_SECONDS = flags.DEFINE_float('seconds', 1500, 'No new row after so many.')
_MAX_ROWS = flags.DEFINE_integer('max_rows', 1000, 'Rows measured per model.')
_RESULTS = flags.DEFINE_string('results', str(HERE), 'Folder of the tables.')


class Bench(NamedTuple):
  """What is measured on a machine; memory is of device and host."""

  models: dict[str, tuple[str, str]]
  curve: str  # the model of that part
  prompts: int
  prompt_len: int
  dtype: str
  disk: bool
  weights: tuple[str, ...]
  cache: tuple[str, ...]
  blocks: tuple[str, ...]


GEN_LEN = 16
_LEAST_SECONDS = 3.0  # that are measured, as far as there are prompts
BENCHES = {
  'cpu': Bench(
    models={
      'opt-125m': ('400MiB', '200MiB'),
      'opt-350m': ('800MiB', '300MiB'),
      'opt-1.3b': ('2GiB', '1GiB'),
    },
    curve='opt-350m',
    prompts=64,
    prompt_len=64,
    dtype='float32',
    disk=True,
    weights=('50,0,50', '30,20,50', '0,0,100'),
    cache=('100,0,0', '0,0,100'),
    blocks=('8x1', '16x1', '16x4', '32x2', '64x1'),
  ),
  'h200': Bench(
    models={
      'opt-1.3b': ('3GiB', '110GiB'),
      'opt-2.7b': ('6GiB', '110GiB'),
      'opt-6.7b': ('14GiB', '110GiB'),
    },
    curve='opt-2.7b',
    prompts=96,
    prompt_len=512,
    dtype='bfloat16',
    disk=False,
    weights=('0,100,0', '50,50,0', '100,0,0'),
    cache=('0,100,0', '100,0,0'),
    blocks=('48x2', '24x4', '96x1', '48x1', '16x1', '8x1'),
  ),
}


class Runner:
  """One model on this machine, under its budgets."""

  def __init__(self, model: str, bench: Bench):
    self.model, self.bench = model, bench
    device, host = bench.models.get(model, (None, None))
    device, host = _DEVICE.value or device, _HOST.value or host
    self.budgets = {'device': parse_bytes(device), 'host': parse_bytes(host)}
    self.disk = Path(_DISK.value) / model if bench.disk else None
    self.prompts = _PROMPTS.value or bench.prompts
    preset = model != 'bundled'
    self.name = model if preset else None
    self.source = sources.find_source(self.name, random_weights=preset, seed=0)
    record = _HARDWARE.value
    self.record = hardware.read(record) if record else None
    devices.limit(self.budgets['device'], self.budgets['host'])
    vocabulary = self.source.config.vocab_size
    size = (self.prompts, bench.prompt_len)
    rng = np.random.default_rng(0)
    self.ids = rng.integers(4, vocabulary, size).tolist()

  def load(self, **policy: Any) -> LoadedModel:
    return LoadedModel(
      self.source,
      Policy(**({'attention': None} | policy)),
      dtype=self.bench.dtype,
      budgets=self.budgets,
      disk_dir=self.disk,
      record=self.record,
    )

  def pareto(self) -> list[Any]:
    return plans.pareto(
      self.name,
      prompt_len=self.bench.prompt_len,
      gen_len=GEN_LEN,
      num_prompts=self.prompts,
      hardware=self.record,
      dtype=self.bench.dtype,
      device_memory=self.budgets['device'],
      host_memory=self.budgets['host'],
      disk_space=None if self.disk else 0,
      disk_dir=self.disk,
    )

  def measure(
    self, loaded: LoadedModel, size: int | None, batches: int | None
  ) -> dict[str, Any]:
    """Runs a block by a policy, warmed up; several where they are short.

    Returns:
      Its row; `tokens_per_s` is what all prompts would get, whose last block
      may be a smaller one.
    """
    began, gflops = time.perf_counter(), common.cpu_gflops()
    policy = loaded.policy
    row: dict[str, Any] = {
      'batch_size': size,
      'num_batches': batches,
      **{name: _text(getattr(policy, name)) for name in _CLASSES},
      'attention': policy.attention,
      'status': 'measured',
      **dict.fromkeys(_FIGURES, ''),
    }
    try:
      llm = LLM(loaded, size, batches)
      params = SamplingParams(max_new_tokens=GEN_LEN, ignore_eos=True)
      llm.warm_up(self.ids, params)
      plan, predicted = loaded.plan, loaded.choice.prediction
      work = plan.problem.work
      block = work.batch_size * work.num_batches
      most = max(1, self.prompts // block)
      blocks = min(most, math.ceil(_LEAST_SECONDS / predicted.seconds))
      stream = llm.stream(self.ids, params)
      list(itertools.islice(stream, min(blocks * block, self.prompts)))
      stream.close()
      seconds = llm.stats.prefill_seconds + llm.stats.decode_seconds
      seconds /= blocks
      row |= {
        'batch_size': work.batch_size,
        'num_batches': work.num_batches,
        **{name: _text(getattr(plan.policy, name)) for name in _CLASSES},
        'attention': plan.policy.attention,
        'predicted_tokens_per_s': self._rate(block, predicted.seconds),
        'tokens_per_s': self._rate(block, seconds),
        'predicted_seconds': round(predicted.seconds, 4),
        'seconds': round(seconds, 4),
      }
    except InputError as error:
      row |= {'status': 'does not fit', 'why': _line(error)}
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
      row |= {'status': 'failed', 'why': _line(error)}
    row['cpu_gflops'] = min(gflops, common.cpu_gflops())
    return row | {'took_s': round(time.perf_counter() - began, 1)}

  def _rate(self, block: int, seconds: float) -> float:
    blocks = math.ceil(self.prompts / block)
    return round(self.prompts * GEN_LEN / (blocks * seconds), 3)

  def append(self, table: str, row: dict[str, Any], **more: Any) -> None:
    fields = {
      'machine': _MACHINE.value,
      'model': self.model,
      'commit': _COMMIT.value,
      **more,
      **row,
      'num_prompts': self.prompts,
      'prompt_len': self.bench.prompt_len,
      'gen_len': GEN_LEN,
      'dtype': self.bench.dtype,
      **{f'{tier}_memory': n for tier, n in self.budgets.items()},
    }
    common.append(Path(_RESULTS.value) / f'{table}.csv', fields)


_CLASSES = ('weights', 'cache', 'hidden')
_FIGURES = (
  'predicted_tokens_per_s', 'tokens_per_s', 'predicted_seconds', 'seconds',
  'why',
)  # fmt: skip


def _text(split: Split | None) -> str:
  return ','.join(f'{part:g}' for part in split) if split else ''


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]


def grid(runner: Runner, until: float) -> None:
  bench, left = runner.bench, _MAX_ROWS.value
  pick(runner)
  for weights in bench.weights:
    loaded = runner.load(
      weights=Split.parse(weights, 'weights'),
      hidden=Split(100, 0, 0),
      attention='device',
    )
    for block, cache in itertools.product(bench.blocks, bench.cache):
      split = Split.parse(cache, 'cache')
      loaded.policy = dataclasses.replace(loaded.policy, cache=split)
      size, batches = map(int, block.split('x'))
      if left <= 0 or time.time() > until:
        print(f'skipped: {runner.model} {weights} {cache} {block}', flush=True)
        continue
      row = runner.measure(loaded, size, batches)
      runner.append('grid', row, is_pick=0)
      left -= row['status'] == 'measured'
    loaded.close()
  if bench.disk:  # again: the first to run finds weights just written
    pick(runner)


def pick(runner: Runner) -> None:
  loaded = runner.load()
  runner.append('grid', runner.measure(loaded, None, None), is_pick=1)
  loaded.close()


def curve(runner: Runner, until: float) -> None:
  for choice in runner.pareto()[: _MAX_ROWS.value]:
    policy, work = choice.plan.policy, choice.plan.problem.work
    if time.time() > until:
      print(f'skipped: {runner.model} {work} {policy}', flush=True)
      continue
    parts = {name: getattr(policy, name) for name in _CLASSES}
    loaded = runner.load(**parts, attention=policy.attention)
    row = runner.measure(loaded, work.batch_size, work.num_batches)
    runner.append('curve', row)
    loaded.close()


def main(argv):
  bench = BENCHES[_MACHINE.value]
  until = time.time() + _SECONDS.value
  if _MODEL.value:
    part = {'grid': grid, 'curve': curve}[_PARTS.value[0]]
    part(Runner(_MODEL.value, bench), until)
    return
  for part in _PARTS.value:
    models = list(bench.models) if part == 'grid' else [bench.curve]
    for model in _MODELS.value or models:
      if (left := until - time.time()) <= 0:
        print(f'skipped: {part} {model}', flush=True)
        continue
      mine = [f'--parts={part}', f'--model={model}', f'--seconds={left}']
      command = [sys.executable, __file__, *sys.argv[1:], *mine]
      if code := subprocess.run(command, check=False).returncode:
        print(f'failed: {part} {model}, exit {code}', flush=True)


if __name__ == '__main__':
  app.run(main)
