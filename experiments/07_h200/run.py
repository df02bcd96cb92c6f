"""How near is the engine to an H200's limits?

Every row is a model under `--device_memory=16GiB --host_memory=110GiB`, prompt
512 and 32 new tokens, in a fresh process that loads once and runs a few times
after a warm-up of two tokens. A run is a line of results.csv.

The link's bound of a decode step is the bytes that cross in one, over the rate
of a bare loop.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import flexjax
from experiments import common
from flexjax import hardware
from flexjax.config import SamplingParams, Split
from flexjax.runtime import simulate, timeline
from flexjax.runtime.llm import LLM
from flexjax.runtime.timeline import Span

HERE = Path(__file__).parent
RECORD = HERE.parent.parent / 'configs' / 'hardware' / 'h200.json'
_ROWS = flags.DEFINE_list('rows', None, 'Rows to run; default all.')
_ROW = flags.DEFINE_string('row', None, 'One row, in this process.')
_RUNS = flags.DEFINE_integer('runs', 3, 'Runs of a row.')
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_TIMEOUT = flags.DEFINE_integer('timeout', 600, 'Seconds for one row.')
_HARDWARE = flags.DEFINE_string(
  'hardware', str(RECORD), "The machine's record; '' to measure it."
)
_TRACE = flags.DEFINE_string(
  'trace', None, 'File for a timeline: one run more is recorded.'
)
_STEPS = flags.DEFINE_string(
  'steps', None, 'CSV to append a decode step of such a run to.'
)
_SMALL = flags.DEFINE_bool('small', False, 'Sizes for trying the script.')

PROMPT_LEN, GEN_LEN = 512, 32
_STEP = 16  # the decode step that is shown
_GAP = 1e-4  # seconds; spans that are nearer than that are one
PROMPTS = 100_000  # more than any block
# Searching for ranges in random numbers would only take time.
_FOUR = {'weight_bits': 4, 'cache_bits': 4, 'rounding': 'minmax'}
_HOST = {
  'weights': (0, 100, 0),
  'cache': (0, 100, 0),
  'hidden': (100, 0, 0),
  'attention': 'device',
}
ROWS: dict[str, dict[str, Any]] = {
  '6.7b-lossy': {'model': 'opt-6.7b', 'allow_lossy': True},
  '6.7b-host-48x2': {
    'model': 'opt-6.7b', **_HOST, 'batch_size': 48, 'num_batches': 2
  },
  '30b': {'model': 'opt-30b'},
  '30b-host': {'model': 'opt-30b', 'attention': 'host'},
  '30b-4': {'model': 'opt-30b', **_FOUR},
  '175b-4': {'model': 'opt-175b', **_FOUR},
}  # fmt: skip


def run(name: str) -> None:
  """Runs one row, a line for every run."""
  prompt_len, gen_len = PROMPT_LEN, GEN_LEN
  options: dict[str, Any] = {
    'random_weights': True,
    'dtype': 'bfloat16',
    'device_memory': '16GiB',
    'host_memory': '110GiB',
    'hardware': _HARDWARE.value or None,
    **ROWS[name],
  }
  if _SMALL.value:
    prompt_len, gen_len = 16, 4
    options |= {'model': 'opt-125m', 'device_memory': None, 'hardware': None}
    options |= {'host_memory': '2GiB', 'dtype': 'float32'}
    options |= {'batch_size': 4, 'num_batches': 2}
  params = SamplingParams(max_new_tokens=gen_len, ignore_eos=True)
  with flexjax.load(**options) as llm:
    count = llm.block_size(prompt_len, gen_len)
    rng = np.random.default_rng(0)
    size = (count, prompt_len)
    ids = rng.integers(4, llm.config.vocab_size, size).tolist()
    began = time.perf_counter()
    llm.warm_up(ids, params)
    ready = time.perf_counter() - began
    for n in range(_RUNS.value):
      llm.generate(ids, params)
      common.append(_RESULTS.value, figures(name, n, count, ready, llm))
    if _TRACE.value or _STEPS.value:
      llm.record = True
      llm.generate(ids, params)
    if _TRACE.value:
      timeline.write(_TRACE.value, llm.timeline(), 'measured')
    if _STEPS.value:
      append_step(name, gen_len, llm)


def figures(
  name: str, n: int, count: int, ready: float, llm: LLM
) -> dict[str, Any]:
  """The figures of a run of `count` prompts, with what it ran by."""
  stats = llm.stats.to_json()
  fields = common.record(name, _COMMIT.value, [], stats)
  del fields['arguments']
  work, policy = llm.plan.problem.work, llm.plan.policy
  blocks = -(-count // (work.batch_size * work.num_batches))
  moved = stats['link_bytes']['host_to_device']
  decoded = moved - blocks * weights_moved(llm)
  bound = decoded / (GEN_LEN - 1) / common.LINK_BYTES_PER_S
  fields['link_bound_step_s'] = round(bound, 4)
  predicted: Mapping[str, Any] = stats['predicted']
  flop_s = blocks * prefill_flop(llm) / stats['prefill_seconds']
  fields |= {
    'run': n,
    'load_and_compile_s': round(ready, 1),
    'predicted_tokens_per_s': round(predicted['throughput_tokens_per_s'], 2),
    'prefill_bound_by': predicted['binding']['prefill'],
    'decode_bound_by': predicted['binding']['decode'],
    'prefill_tflop_s': round(flop_s / 1e12),
    'batch_size': work.batch_size,
    'num_batches': work.num_batches,
    'weight_bits': policy.weight_bits,
    'cache_bits': policy.cache_bits,
  }  # fmt: skip
  for split in ('weights', 'cache', 'hidden'):
    fields[split] = _text(getattr(policy, split))
  return fields


def append_step(name: str, gen_len: int, llm: LLM) -> None:
  """What was busy when in a decode step, measured and predicted."""
  record = hardware.read(_HARDWARE.value or str(RECORD))
  predicted = simulate.timeline(llm.plan, record)
  step = min(_STEP, gen_len - 2)
  for title, spans in ('measured', llm.timeline()), ('predicted', predicted):
    for row in step_of(spans, step):
      head = {'row': name, 'commit': _COMMIT.value, 'step': step}
      common.append(_STEPS.value, {**head, 'title': title, **row})


def step_of(spans: Sequence[Span], step: int) -> Iterator[dict[str, Any]]:
  """Yields what tracks were busy with from the first compute of a step to the
  first of the next; in milliseconds of the step."""
  computed = [s for s in spans if s.track == 'device' and 'i' in s.args]
  origin, end = (
    min(s.begin for s in computed if s.args['i'] == i) for i in (step, step + 1)
  )
  for track in timeline.TRACKS:
    if track == 'dispatch':  # thousands, and never idle
      continue
    mine = [s for s in spans if s.track == track]
    mine = [s for s in mine if s.end > origin and s.begin < end]
    for begin, until, count in merged(mine):
      yield {
        'track': track,
        'begin_ms': round(1e3 * (max(begin, origin) - origin), 2),
        'end_ms': round(1e3 * (min(until, end) - origin), 2),
        'spans': count,
      }


def merged(spans: Sequence[Span]) -> Iterator[tuple[float, float, int]]:
  """Yields spans as busy intervals with how many spans each is made of."""
  spans = sorted(spans, key=lambda s: s.begin)
  while spans:
    begin, end, count = spans[0].begin, spans[0].end, 1
    while count < len(spans) and spans[count].begin - end < _GAP:
      end = max(end, spans[count].end)
      count += 1
    yield begin, end, count
    spans = spans[count:]


def weights_moved(llm: LLM) -> int:
  """Bytes of weights that cross in a step: all that a block's prefill loads."""
  problem, places = llm.plan.problem, llm.plan.places
  return sum(
    problem.group_bytes[g]
    for _, groups in problem.layers
    for g in groups
    if places.get(('weights', g)) in ('host', 'disk')
  )


def prefill_flop(llm: LLM) -> float:
  """Multiplications and additions of the layers' matrices, of a block:
  attention and the head, 1 to 3 % of a prefill, are left out."""
  c, work = llm.config, llm.plan.problem.work
  parameters = c.num_layers * (
    4 * c.hidden_size**2 + 2 * c.hidden_size * c.ffn_size
  )
  prompts = work.batch_size * work.num_batches
  return 2.0 * parameters * prompts * work.prompt_len


def _text(split: Split) -> str:
  return f'{split.device:g},{split.host:g},{split.disk:g}'


def main(argv: list[str]) -> None:
  del argv
  if _ROW.value:
    run(_ROW.value)
    return
  failed = []
  for name in _ROWS.value or ROWS:
    done = subprocess.run(
      [sys.executable, __file__, f'--row={name}', *_given()],
      timeout=_TIMEOUT.value,
      check=False,
    )
    if done.returncode:
      failed.append(name)
  if failed:
    sys.exit(f'failed: {", ".join(failed)}')


def _given() -> list[str]:
  """The flags of this process, for those it starts."""
  mine = flags.FLAGS.flags_by_module_dict()[sys.argv[0]]
  return [
    f.serialize() for f in mine if f.present and f.name not in ('row', 'rows')
  ]


if __name__ == '__main__':
  app.run(main)
