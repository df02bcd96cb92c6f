"""What a run shows: a progress bar and a table on the terminal, JSON."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import rich.table
from absl import flags

from flexjax import atomic
from flexjax.runtime import timeline
from flexjax.runtime.llm import LLM

FLAGS = flags.FLAGS
_LABELS = {
  'profile': 'looking at layers',
  'load': 'loading weights',
  'generate': 'generating tokens',
  'score': 'scoring tokens',
  'calibrate': 'measuring this machine',
}
_CALIBRATES = (
  'flexjax: measuring this machine, once, to plan by; flexjax calibrate does '
  'it more thoroughly'
)


def define() -> None:
  flags.DEFINE_string('stats', None, "File for the run's figures, JSON.")


def define_trace() -> None:
  flags.DEFINE_string(
    'trace',
    None,
    'File for the timeline of the run, a Chrome/Perfetto trace.',
  )


def write_trace(llm: LLM) -> None:
  """Writes --trace, where it is wanted: what the latest run did when."""
  if FLAGS.trace:
    timeline.write(FLAGS.trace, llm.timeline(), 'measured')


@contextmanager
def progress(llm: LLM) -> Iterator[None]:
  """Shows a progress bar while the body runs; without a terminal it only says
  that this machine is measured, which nobody has asked for."""
  with calibrating() as llm.on_progress:
    yield


@contextmanager
def calibrating() -> Iterator[Callable[[str, int, int], None]]:
  """Likewise, for whatever calls what it yields: (what, done, total)."""
  with bar() as on_progress:

    def told(what: str, done: int, total: int) -> None:
      if what == 'calibrate' and not done:
        print(_CALIBRATES, file=sys.stderr, flush=True)
      on_progress(what, done, total)

    yield told


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
  """Likewise, for whatever calls what it yields: (what, done, total)."""
  console = rich.console.Console(stderr=True)
  if not console.is_terminal:
    yield lambda what, done, total: None
    return
  columns = (
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
  )
  with rich.progress.Progress(
    *columns, console=console, transient=True
  ) as shown:
    tasks: dict[str, rich.progress.TaskID] = {}

    def on_progress(what: str, done: int, total: int) -> None:
      if what not in tasks:
        tasks[what] = shown.add_task(_LABELS[what], total=total)
      shown.update(tasks[what], completed=done, total=total)

    yield on_progress


class _Console(rich.console.Console):
  """A console that leaves it to the command line what a closed pipe means."""

  def on_broken_pipe(self) -> None:
    raise BrokenPipeError


def console(width: int) -> rich.console.Console:
  """Returns what prints results: as wide as the terminal, or `width` columns
  where there is none."""
  found = _Console()
  return found if found.is_terminal else _Console(width=width)


def show(llm: LLM, figures: Mapping[str, Any] | None = None) -> None:
  """Prints the figures of the latest run, and writes --stats.

  `figures` are what the run was made to find out; they come first in the
  table, and are the field `eval` of --stats.
  """
  table = rich.table.Table(show_header=False, box=None, pad_edge=False)
  for name, value in (figures or {}).items():
    text = f'{value:.6g}' if isinstance(value, float) else str(value)
    table.add_row(name.replace('_', ' '), text)
  for label, value in llm.stats.rows():
    table.add_row(label, value)
  rich.console.Console(stderr=True).print(table)
  if FLAGS.stats:
    fields = llm.stats.to_json()
    if figures:
      fields['eval'] = figures
    atomic.write(Path(FLAGS.stats), [json.dumps(fields, indent=2), '\n'])
  sys.stderr.flush()
