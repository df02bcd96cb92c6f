"""flexjax batch: a file of requests in, a file of results out.

  flexjax batch --input=requests.jsonl --output=results.jsonl

--input is one of OpenAI's batch files for /v1/completions, or has an object per
line with `prompt` and any sampling field. Whatever stops the job, the same
command goes on with it. Exits with 0 if every request was answered, 1 if some
could not be, 130 if it was stopped and there is more to do.
"""

import dataclasses
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
from absl import flags

from flexjax import atomic
from flexjax.apps import batch, inputs
from flexjax.apps.journal import (
  Journal,
  check_target,
  committed,
  kept_of,
  state_of,
)
from flexjax.cli import files, report
from flexjax.cli import flags as shared
from flexjax.config import SamplingParams
from flexjax.errors import InputError

FLAGS = flags.FLAGS
_FAILED, _STOPPED = 1, 130
_LOG_SECONDS = 60
_SETTLED = ('dtype', 'weight_bits', 'cache_bits', 'attention')
# What results depend on, beside input and model.
_SETTINGS = (*_SETTLED, 'group_size', 'rounding', 'allow_lossy', 'ordered')


def define() -> None:
  shared.define_policy()
  shared.define_sampling()
  report.define()
  flags.DEFINE_string('input', None, 'File of requests, JSONL.')
  flags.DEFINE_string(
    'output',
    None,
    'File of results, JSONL; OUTPUT.job and .job.kept beside it hold how far '
    'the job is.',
  )
  flags.DEFINE_bool(
    'ordered',
    False,
    'Results in the order of the input. Default: as they are done.',
  )


def run() -> int:
  for name in ('input', 'output'):
    if not FLAGS[name].value:
      raise InputError(f'--{name} is missing')
  source, target = Path(FLAGS.input), Path(FLAGS.output)
  if not source.is_file():
    raise InputError(f"--input '{source}' is not a file")
  check_target(target)
  written = {
    'output': FLAGS.output,
    "output's journal": str(state_of(target)),
    "output's kept results": str(kept_of(target)),
    'stats': FLAGS.stats,
  }
  read = {'input': FLAGS.input, 'hardware': FLAGS.hardware}
  files.check_outputs(written, read)
  default = shared.sampling()
  survey = inputs.survey(source)
  settings = {name: FLAGS[name].value for name in _SETTINGS}
  if (done := committed(target)) and done['form']:
    # What was left open is settled since the first block.
    for name in _SETTLED:
      FLAGS[name].value = str(done['form'][name])
  with shared.open_model() as llm:
    about = _about(survey, llm.fingerprint, settings, default)
    journal = Journal(target, about)
    try:
      job = batch.Job(
        llm, source, journal, default=default, ordered=FLAGS.ordered
      )
      with _progress(job, survey.lines), _signals(job):
        ended = job.run()
    finally:
      journal.close()
  _show(job)
  if not ended:
    print(
      'flexjax: stopped; the same command goes on with the job',
      file=sys.stderr,
    )
    return _STOPPED
  return _FAILED if job.figures.failed else 0


def _about(
  survey: inputs.Survey,
  model: str,
  settings: dict[str, Any],
  default: SamplingParams,
) -> dict[str, Any]:
  return {
    'input': survey.digest,
    'model': model,
    **{f'--{name}': value for name, value in settings.items()},
    **{
      f'--{name}': value for name, value in dataclasses.asdict(default).items()
    },
  }


@contextmanager
def _signals(job: batch.Job) -> Iterator[None]:
  """The first signal ends the job after its block, the second one at once."""

  def on_signal(number: int, frame: Any) -> None:
    if job.stopping:
      raise KeyboardInterrupt
    job.stopping = True
    print(
      'flexjax: ends after this block; once more to stop at once',
      file=sys.stderr,
      flush=True,
    )

  before = {
    number: signal.signal(number, on_signal)
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextmanager
def _progress(job: batch.Job, total: int) -> Iterator[None]:
  """A bar on a terminal; elsewhere a line a minute."""
  console = rich.console.Console(stderr=True)
  if not console.is_terminal:
    log = job.on_block = _logged(job, total)
    with report.calibrating() as told:

      def on_progress(what: str, done: int, total: int) -> None:
        told(what, done, total)
        log()  # a block may take longer than a minute

      job.llm.on_progress = on_progress
      yield
    return
  columns = (
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn('{task.fields[more]}'),
  )
  with rich.progress.Progress(*columns, console=console) as shown:
    task = shown.add_task('answering', total=total, more='')

    def on_block() -> None:
      f = job.figures
      shown.update(task, completed=f.answered + f.failed, more=_rates(job))

    job.on_block = on_block
    on_block()
    yield


def _logged(job: batch.Job, total: int) -> Callable[[], None]:
  log = logging.getLogger('flexjax.batch')
  if not log.handlers:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
  began = latest = time.monotonic()
  before = job.figures.answered + job.figures.failed

  def on_block() -> None:
    nonlocal latest
    now = time.monotonic()
    if now - latest < _LOG_SECONDS:
      return
    latest = now
    done = job.figures.answered + job.figures.failed
    left = (total - done) * (now - began) / max(1, done - before)
    log.info('%d of %d, %s, %.0f s left', done, total, _rates(job), left)

  return on_block


def _rates(job: batch.Job) -> str:
  fields = job.figures.to_json()
  failed = f', {job.figures.failed} failed' if job.figures.failed else ''
  return f'{fields["new_tokens_per_s"]:.1f} tokens/s{failed}'


def _show(job: batch.Job) -> None:
  """Prints the job's figures, and writes --stats."""
  f, fields = job.figures, job.figures.to_json()
  print(
    f'flexjax: {f.answered} answered, {f.failed} failed; {f.new_tokens} new '
    f'tokens, {fields["new_tokens_per_s"]:.1f} a second; padding '
    f'{100 * fields["padding_waste"]:.0f} % of {len(f.shapes)} shapes',
    file=sys.stderr,
  )
  if FLAGS.stats:
    atomic.write(Path(FLAGS.stats), [json.dumps(fields, indent=2), '\n'])
