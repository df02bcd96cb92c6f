"""Data wrangling by a language model that is shown a few examples.

Three tasks over tables (after Narayan et al., VLDB 2023): `match` asks whether
two records mean the same thing, `impute` for a value that is missing, `errors`
whether a value is wrong. A row becomes a question in plain text; some answered
rows of another table go before it; the answer is the first line that the model
adds. All is pure but `run`, which asks the model.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexjax.apps.tables import Table, one_line, serialise
from flexjax.config import SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.llm import LLM

TASKS = ('match', 'impute', 'errors')
LABEL = 'label'
"""Column that holds Yes or No, for `match` and `errors`."""
_YES_NO = {'yes': 'Yes', '1': 'Yes', 'no': 'No', '0': 'No'}
_SIDES = {'A': 'left_', 'B': 'right_'}
_NEW_TOKENS = {'match': 4, 'impute': 32, 'errors': 4}  # by default
_AROUND = ' \t"\'`.,;'  # what may stand around an answer and is none of it


@dataclasses.dataclass(frozen=True)
class Example:
  """A row as a question.

  Attributes:
    where: the row's place, for errors.
    question: all that comes before the answer, without a space at the end.
    answer: 'Yes' or 'No', or for `impute` the value; None where it is not
      known.
  """

  where: str
  question: str
  answer: str | None


@dataclasses.dataclass(frozen=True)
class Result:
  """What a model has made of a table.

  Attributes:
    predictions: per row the answer; None where none could be read.
    generated: per row the text that it was read from.
    figures: what they come to, keyed by name; None for what is not defined.
  """

  predictions: list[str | None]
  generated: list[str]
  figures: dict[str, Any]


def check_target(task: str, target: str | None) -> None:
  """Checks the task's name, and whether it has a column to ask for.

  Raises:
    InputError: there is no such task, it wants a column, or it takes none.
  """
  _check_task(task)
  if task == 'match' and target is not None:
    raise InputError('match takes no target: it asks about whole records')
  if task != 'match' and not target:
    raise InputError(f'{task} needs a target: the column to ask for')
  if task == 'errors' and target == LABEL:
    raise InputError(f"the target of errors cannot be '{LABEL}'")


def examples(
  task: str,
  table: Table,
  target: str | None = None,
  *,
  answered: bool = False,
) -> list[Example]:
  """Makes a question of every row.

  Args:
    target: the column to ask for; None for `match`.
    answered: every row must have its answer. Otherwise it may be blank.

  Raises:
    InputError: task and target do not go together, a column is missing, or a
      label is neither Yes nor No (or 1 or 0); names the table or the row.
  """
  check_target(task, target)
  _check_columns(task, table, target)
  key = str(target) if task == 'impute' else LABEL
  made = []
  for where, row in zip(table.places, table.rows, strict=True):
    answer = one_line(row[key]) or None
    if answer is None and answered:
      raise InputError(f"{where}: '{key}' is blank; an example needs it")
    if answer is not None and task != 'impute':
      answer = _YES_NO.get(answer.lower())
      if answer is None:
        raise InputError(
          f"{where}: '{key}' must be Yes or No, or 1 or 0, got '{row[key]}'"
        )
    made.append(Example(where, _question(task, row, target), answer))
  return made


def draw(train: Sequence[Example], shots: int, seed: int = 0) -> list[Example]:
  """Draws `shots` different examples, the same ones for the same seed.

  Raises:
    InputError: `shots` is negative or more than there are; the seed is
      negative.
  """
  if not 0 <= shots <= len(train):
    raise InputError(
      f'shots must be between 0 and {len(train)}, the examples there are, got '
      f'{shots}'
    )
  if seed < 0:
    raise InputError(f'seed must be at least 0, got {seed}')
  return random.Random(seed).sample(list(train), shots)


def build_prompt(
  row: Example,
  shots: Sequence[Example],
  count: Callable[[str], int],
  limit: int,
) -> tuple[str, int]:
  """Puts answered examples before a question, as many as there is room for.

  Args:
    count: returns how many tokens a prompt has.
    limit: how many it may have.

  Returns:
    The prompt, and how many examples were dropped, the first ones first.

  Raises:
    InputError: the question alone has more tokens.
  """
  tokens = 0
  for dropped in range(len(shots) + 1):
    shown = [f'{s.question} {s.answer}\n\n' for s in shots[dropped:]]
    prompt = ''.join([*shown, row.question])
    tokens = count(prompt)
    if tokens <= limit:
      return prompt, dropped
  raise InputError(
    f'{row.where}: the question has {tokens} tokens without any example; the '
    f'context has room for {max(limit, 0)} beside the answer'
  )


def read_answer(task: str, text: str) -> str | None:
  """Reads the answer from the first line of what was generated.

  Returns:
    'Yes' or 'No' where the line begins with that word, whatever its case; for
    `impute` the line without quotes and stops around it. None where it says
    nothing of the kind.
  """
  line = one_line(text.split('\n', 1)[0])
  if task == 'impute':
    return line.strip(_AROUND) or None
  word = re.match(r'\W*(yes|no)\b', line, re.IGNORECASE)
  return _YES_NO[word[1].lower()] if word else None


def measure(
  task: str, predictions: Sequence[str | None], answers: Sequence[str | None]
) -> dict[str, float | None]:
  """Returns precision, recall and F1 of 'Yes', or for `impute` the accuracy.

  A prediction of None, an answer that could not be read, counts as No, or as
  a wrong value. Values are the same whatever their case, repeated spaces, and
  quotes and stops around them. Rows whose answer is None do not count. A ratio
  whose denominator is zero is None.
  """
  both = zip(predictions, answers, strict=True)
  pairs = [(p, a) for p, a in both if a is not None]
  if task == 'impute':
    right = sum(p is not None and _plain(p) == _plain(a) for p, a in pairs)
    return {'accuracy': _ratio(right, len(pairs))}
  found = sum(p == 'Yes' and a == 'Yes' for p, a in pairs)
  said = sum(p == 'Yes' for p, _ in pairs)
  true = sum(a == 'Yes' for _, a in pairs)
  return {
    'precision': _ratio(found, said),
    'recall': _ratio(found, true),
    'f1': _ratio(2 * found, said + true),
  }


def run(
  llm: LLM,
  task: str,
  rows: Sequence[Example],
  shots: Sequence[Example],
  max_new_tokens: int | None = None,
) -> Result:
  """Asks the model about every row; greedy, so the same each time.

  Args:
    rows: from `examples`, of the same task as `shots`.
    shots: what every prompt begins with, as far as the context has room.
    max_new_tokens: of an answer, at most; default 4 for Yes and No, 32 for a
      value.

  Raises:
    InputError: there is no such task, the model has no tokenizer, or a row
      does not fit its context.
  """
  _check_task(task)
  tokenizer = llm.tokenizer
  if tokenizer is None:
    raise InputError('wrangle needs a model with a tokenizer')
  new = _NEW_TOKENS[task] if max_new_tokens is None else max_new_tokens
  params = SamplingParams(max_new_tokens=new, stop=('\n',))
  limit = llm.config.max_positions - new

  def count(prompt: str) -> int:
    return len(tokenizer.encode(prompt))

  built = [build_prompt(row, shots, count, limit) for row in rows]
  outputs = llm.generate([prompt for prompt, _ in built], params)
  generated = [output.text for output in outputs]
  predictions = [read_answer(task, text) for text in generated]
  answers = [row.answer for row in rows]
  figures = {
    **measure(task, predictions, answers),
    'rows': len(rows),
    'labelled': sum(a is not None for a in answers),
    'unread': sum(p is None for p in predictions),
    'shortened_prompts': sum(dropped > 0 for _, dropped in built),
    'dropped_examples': sum(dropped for _, dropped in built),
  }
  return Result(predictions, generated, figures)


def _check_task(task: str) -> None:
  if task not in TASKS:
    raise InputError(f"task must be one of {', '.join(TASKS)}, got '{task}'")


def _check_columns(task: str, table: Table, target: str | None) -> None:
  wanted = [] if target is None else [target]
  wanted += [] if task == 'impute' else [LABEL]
  for column in wanted:
    if column not in table.columns:
      raise InputError(f"'{table.name}' has no column '{column}'")
  if task == 'impute' and len(table.columns) == 1:
    raise InputError(f"'{table.name}' has no column besides '{target}'")
  if task == 'match':
    for start in _SIDES.values():
      if not any(_named(column, start) for column in table.columns):
        raise InputError(f"'{table.name}' has no column '{start}...'")


def _named(column: str, start: str) -> bool:
  return column.startswith(start) and column != start


def _question(task: str, row: Mapping[str, str], target: str | None) -> str:
  """Returns the row in words, what is asked, and where the answer goes."""
  if task == 'match':
    lines = []
    for side, start in _SIDES.items():
      own = {c.removeprefix(start): row[c] for c in row if _named(c, start)}
      lines.append(f'{side}: {serialise(own)}'.rstrip())
    asked = 'Do A and B describe the same thing?'
  else:
    hidden = {target, LABEL} if task == 'errors' else {target}
    lines = [serialise({c: v for c, v in row.items() if c not in hidden})]
    name = one_line(str(target))
    asked = f'What is the value of {name}?'
    if task == 'errors':
      asked = f'Is "{one_line(row[str(target)])}" a wrong value of {name}?'
  return '\n'.join([*filter(None, lines), f'Question: {asked}', 'Answer:'])


def _ratio(part: int, whole: int) -> float | None:
  return part / whole if whole else None


def _plain(value: str) -> str:
  """Returns what two values must share to be the same."""
  return one_line(value).strip(_AROUND).casefold()
