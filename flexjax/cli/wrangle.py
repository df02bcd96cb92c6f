"""flexjax wrangle: match records, fill in values, find errors in tables.

  flexjax wrangle --task=match --train=seen.csv --input=pairs.csv
  flexjax wrangle --task=impute --target=city --train=seen.csv --input=new.csv
  flexjax wrangle --task=errors --target=city --train=seen.csv --input=new.csv

--train and --input are CSV with a header. Pairs to match have columns left_*
and right_*; match and errors have a column label, Yes or No. The model sees
--shots answered rows of --train, then a row of --input. The figures go to
standard output as one line of JSON, the answers to --output.
"""

import json
from pathlib import Path

from absl import flags

from flexjax import atomic
from flexjax.apps import tables, wrangle
from flexjax.cli import files, report
from flexjax.cli import flags as shared
from flexjax.errors import InputError

FLAGS = flags.FLAGS
_ADDED = ('prediction', 'generated')  # columns of --output


def define() -> None:
  shared.define_policy()
  report.define()
  flags.DEFINE_string(
    'task',
    None,
    'match (are two records the same thing), impute (a value that is missing) '
    'or errors (is a value wrong).',
  )
  flags.DEFINE_string('train', None, 'Rows with answers, CSV, for --shots.')
  flags.DEFINE_string(
    'input',
    None,
    'Rows to answer, CSV. Where an answer is there too, it counts in the '
    'figures.',
  )
  flags.DEFINE_string(
    'target', None, 'The column to ask for; for impute and errors.'
  )
  flags.DEFINE_integer(
    'shots', 10, 'Rows of --train that every prompt begins with.'
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the choice of these rows.')
  flags.DEFINE_integer(
    'max_new_tokens',
    None,
    'Tokens of an answer, at most. Default: 4, for impute 32.',
  )
  flags.DEFINE_string(
    'output',
    None,
    'File of --input with what was answered, CSV. Default: none.',
  )


def run() -> None:
  _check_flags()
  task, target = FLAGS.task, FLAGS.target
  train: list[wrangle.Example] = []
  if FLAGS.train:
    seen = _read('train', FLAGS.train)
    train = wrangle.examples(task, seen, target, answered=True)
  shots = wrangle.draw(train, FLAGS.shots, FLAGS.seed)
  table = _read('input', FLAGS.input)
  rows = wrangle.examples(task, table, target)
  for column in _ADDED:
    if FLAGS.output and column in table.columns:
      raise InputError(
        f"'{table.name}' has a column '{column}', which --output would add"
      )
  shared.check_files('output', 'stats', read=('input', 'train'))
  with shared.open_model() as llm, report.progress(llm):
    result = wrangle.run(llm, task, rows, shots, FLAGS.max_new_tokens)
  if FLAGS.output:
    answered = [
      {**row, 'prediction': prediction or '', 'generated': generated}
      for row, prediction, generated in zip(
        table.rows, result.predictions, result.generated, strict=True
      )
    ]
    text = tables.to_csv([*table.columns, *_ADDED], answered)
    atomic.write(FLAGS.output, [text])
  named = {'task': task, **result.figures}
  print(json.dumps(named), flush=True)
  report.show(llm, named)


def _check_flags() -> None:
  if not FLAGS.task:
    raise InputError(f'wrangle needs --task: {", ".join(wrangle.TASKS)}')
  wrangle.check_target(FLAGS.task, FLAGS.target)
  if not FLAGS.input:
    raise InputError('wrangle needs --input')
  if not FLAGS.train and FLAGS.shots > 0:
    raise InputError('wrangle needs --train, or --shots=0')
  if FLAGS.max_new_tokens is not None and FLAGS.max_new_tokens < 1:
    raise InputError(
      f'--max_new_tokens must be at least 1, got {FLAGS.max_new_tokens}'
    )
  same = files.identity(FLAGS.input)
  if FLAGS.train and files.identity(FLAGS.train) == same:
    # A row among its own examples has its answer before it.
    raise InputError('--train is --input: the examples would be the answers')


def _read(name: str, file: str) -> tables.Table:
  return tables.parse(files.read_text(Path(file), name), file)
