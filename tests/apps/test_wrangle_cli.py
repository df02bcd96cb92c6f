"""The command wrangle: on its example files, and what it refuses and how."""

import csv
import json
from pathlib import Path

import pytest

from flexjax.apps import wrangle
from tests.commands import NO_WEIGHTS, refuses

ROOT = Path(__file__).parents[2]
FILES = ROOT / 'configs/wrangle'


EXAMPLES = {
  'match': ('products', ['--shots=10']),
  'impute': ('restaurants', ['--target=city', '--shots=2']),
  'errors': ('capitals', ['--target=city', '--shots=0']),
}


@pytest.mark.parametrize('task', wrangle.TASKS)
def test_command(flexjax, tmp_path, task):
  name, argv = EXAMPLES[task]
  lines = (FILES / f'{name}.csv').read_text().splitlines()
  given = tmp_path / 'in.csv'
  given.write_text('\n'.join(lines[:7]))
  train = [] if argv[-1] == '--shots=0' else [f'{FILES}/{name}_train.csv']
  done = flexjax(
    'wrangle',
    f'--task={task}',
    *(f'--train={path}' for path in train),
    f'--input={given}',
    f'--output={tmp_path}/out.csv',
    f'--stats={tmp_path}/stats.json',
    '--dtype=float32',
    '--batch_size=4',
    '--max_new_tokens=6',
    *argv,
  )
  assert done.code == 0, done.stderr
  figures = json.loads(done.stdout)
  assert done.stdout == json.dumps(figures) + '\n'
  stats = json.loads((tmp_path / 'stats.json').read_text())
  assert stats['eval'] == figures
  with open(tmp_path / 'out.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  with open(given, newline='') as file:
    for row, before in zip(rows, csv.DictReader(file), strict=True):
      added = {n: row[n] for n in ('prediction', 'generated')}
      assert row == before | added
  assert len(rows) == 6
  assert any(row['generated'] for row in rows)
  for row in rows:
    read = wrangle.read_answer(task, row['generated'])
    assert row['prediction'] == (read or '')
  counted = {
    'task': task,
    'rows': 6,
    'labelled': 6,
    'unread': sum(not row['prediction'] for row in rows),
  }
  if task == 'impute':
    same = sum(r['prediction'].lower() == r['city'].lower() for r in rows)
    counted['accuracy'] = same / 6
  else:
    said = [row['prediction'] == 'Yes' for row in rows]
    true = [row['label'] == 'Yes' for row in rows]
    both = sum(s and t for s, t in zip(said, true, strict=True))
    counted['precision'] = both / sum(said) if any(said) else None
    counted['recall'] = both / sum(true)
    counted['f1'] = 2 * both / (sum(said) + sum(true))
  if task != 'match':
    counted |= {'shortened_prompts': 0, 'dropped_examples': 0}
  else:  # ten pairs are more than the context of 1,024 holds
    dropped = figures['dropped_examples']
    assert 0 < figures['shortened_prompts'] <= min(6, dropped)
    counted |= {
      n: figures[n] for n in ('shortened_prompts', 'dropped_examples')
    }
  assert figures == counted


BAD = {
  'no task': (['--task='], r'needs --task: match, impute, errors'),
  'unknown task': (['--task=join'], r"'join'"),
  'no target': (['--target='], r'errors needs a target'),
  'no input': (['--input='], r'--input'),
  'no train': (['--train='], r'--train'),
  'no such file': (['--train={}/none.csv'], r'--train .*none\.csv'),
  'missing column': (['--target=zip'], r"good\.csv' has no column 'zip'"),
  'missing label': (['--input={}/bare.csv'], r"bare\.csv' .*'label'"),
  'empty file': (['--input={}/empty.csv'], r"empty\.csv' is empty"),
  'no rows': (['--input={}/head.csv'], r"head\.csv' .* no rows"),
  'bad label': (['--input={}/maybe.csv'], r"maybe\.csv:3: .*'maybe'"),
  'unlabelled example': (['--train={}/blank.csv'], r'blank\.csv:2: .*blank'),
  'one file for both': (['--train={}/in.csv'], r'--train is --input'),
  'too many shots': (['--shots=3'], r'shots .* 0 and 2.* 3$'),
  'shots below 0': (['--shots=-1'], r'shots .*-1'),
  'seed below 0': (['--seed=-1'], r'seed .*-1'),
  'no new tokens': (['--max_new_tokens=0'], r'max_new_tokens .* 0$'),
  'no room': (['--max_new_tokens=2000'], r'in\.csv:2: .* room for 0'),
  'output over input': (['--output={}/in.csv'], r'--output .* --input'),
  'output over train': (['--output={}/good.csv'], r'--output .* --train'),
  'stats over output': (['--stats={}/out.csv'], r'--stats .* --output'),
  'output in no directory': (['--output={}/no/out.csv'], r'/no/out\.csv'),
  'column of the output': (['--input={}/taken.csv'], r"column 'prediction'"),
  'no tokenizer': (['--model=opt-125m', '--random_weights'], r'tokenizer'),
}
TABLES = {
  'good': 'city,label\nYrok,yes\nLeeds,no\n',
  'in': 'city,label\nLodnon,yes\n',
  'bare': 'city\nLeeds\n',
  'empty': '',
  'head': 'city,label\n',
  'maybe': 'city,label\nYork,no\nLeeds,maybe\n',
  'blank': 'city,label\nYork,\n',
  'taken': 'city,label,prediction\nYork,no,No\n',
}


@pytest.mark.parametrize('case', BAD.values(), ids=BAD)
def test_command_refused(flexjax, tmp_path, case):
  argv, expected = case
  for name, text in TABLES.items():
    (tmp_path / f'{name}.csv').write_text(text)
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  done = flexjax(
    'wrangle',
    '--task=errors',
    '--target=city',
    '--shots=1',
    f'--train={tmp_path}/good.csv',
    f'--input={tmp_path}/in.csv',
    f'--output={tmp_path}/out.csv',
    f'--stats={tmp_path}/stats.json',
    *(a.replace('{}', str(tmp_path)) for a in argv),
    patch=NO_WEIGHTS,
  )
  refuses(done, expected)
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
