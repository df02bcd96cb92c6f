"""Questions, prompts, answers and figures, worked out by hand."""

import collections
from types import SimpleNamespace

import pytest

from flexjax.apps import tables, wrangle
from flexjax.apps.wrangle import Example
from flexjax.errors import InputError

PAIRS = """id,left_name,right_title,left_price,right_price,label
7,Red  mug,Mug (red),5,,yes
8,Red mug,Saw,,9,0
9,Lamp,Lamp,1,1,
"""
CITIES = """name,city,label
Kew Inn,Leeds,No
Old Mill.,Yrok,1
"""


def table(text, name='t.csv'):
  return tables.parse(text, name)


def test_questions_of_pairs():
  asked = '\nQuestion: Do A and B describe the same thing?\nAnswer:'
  assert wrangle.examples('match', table(PAIRS)) == [
    Example(
      't.csv:2',
      f'A: name: Red mug. price: 5.\nB: title: Mug (red).{asked}',
      'Yes',
    ),
    Example(
      't.csv:3', f'A: name: Red mug.\nB: title: Saw. price: 9.{asked}', 'No'
    ),
    Example(
      't.csv:4',
      f'A: name: Lamp. price: 1.\nB: title: Lamp. price: 1.{asked}',
      None,
    ),
  ]


def test_questions_of_a_column():
  imputed = wrangle.examples('impute', table(CITIES), 'city')
  assert imputed[1] == Example(
    't.csv:3',
    'name: Old Mill. label: 1.\nQuestion: What is the value of city?\nAnswer:',
    'Yrok',
  )
  errors = wrangle.examples('errors', table(CITIES), 'city')
  assert errors == [
    Example(
      't.csv:2',
      'name: Kew Inn.\nQuestion: Is "Leeds" a wrong value of city?\nAnswer:',
      'No',
    ),
    Example(
      't.csv:3',
      'name: Old Mill.\nQuestion: Is "Yrok" a wrong value of city?\nAnswer:',
      'Yes',
    ),
  ]
  alone = wrangle.examples('errors', table('x,label\n"a\nb",no\n'), 'x')
  assert alone[0].question.startswith('Question: Is "a b" a wrong value of x?')


NOT_ASKED = {
  'unknown task': ('join', None, PAIRS, r"match, impute, errors, got 'join'"),
  'target of match': ('match', 'id', PAIRS, r'match takes no target'),
  'no target': ('impute', None, CITIES, r'impute needs a target'),
  'label as target': ('errors', 'label', CITIES, r"cannot be 'label'"),
  'no such target': ('impute', 'zip', CITIES, r"'t.csv' has no column 'zip'"),
  'no label': ('errors', 'a', 'a,b\n1,2\n', r"'t.csv' has no column 'label'"),
  'one column': ('impute', 'a', 'a\n1\n', r"no column besides 'a'"),
  'no left side': ('match', None, 'right_a,label\nx,no\n', r"'left_\.\.\.'"),
  'no right side': (
    'match',
    None,
    'left_a,right_,label\nx,y,no\n',
    r"'right_\.\.\.'",
  ),
  'no such label': (
    'errors',
    'a',
    'a,label\nx,no\ny,maybe\n',
    r"t\.csv:3: 'label' must be Yes or No, or 1 or 0, got 'maybe'",
  ),
}


@pytest.mark.parametrize('case', NOT_ASKED.values(), ids=NOT_ASKED)
def test_not_asked(case):
  task, target, text, expected = case
  with pytest.raises(InputError, match=expected):
    wrangle.examples(task, table(text), target)


def test_examples_must_be_answered():
  with pytest.raises(InputError, match=r"t\.csv:4: 'label' is blank"):
    wrangle.examples('match', table(PAIRS), answered=True)


def test_draw():
  train = [Example(str(n), f'q{n}', 'a') for n in range(9)]
  drawn = [wrangle.draw(train, 4, seed) for seed in range(20)]
  assert drawn[3] == wrangle.draw(train, 4, 3)
  assert all(len({e.where for e in shots}) == 4 for shots in drawn)
  firsts = collections.Counter(shots[0].where for shots in drawn)
  assert len(firsts) > 4
  assert set(wrangle.draw(train, 9)) == set(train)
  assert wrangle.draw([], 0) == []
  for shots, seed, expected in (
    (10, 0, r'0 and 9.*10'),
    (-1, 0, r'-1'),
    (1, -1, r'seed.*-1'),
  ):
    with pytest.raises(InputError, match=expected):
      wrangle.draw(train, shots, seed)


def test_prompt():
  """With one token per character: 'q1 a1' and a blank line are seven."""
  shots = [Example('', f'q{n}', f'a{n}') for n in range(3)]
  row = Example('t.csv:5', 'asked', None)

  def build(limit):
    return wrangle.build_prompt(row, shots, len, limit)

  whole = 'q0 a0\n\nq1 a1\n\nq2 a2\n\nasked'
  assert build(26) == (whole, 0)
  assert build(25) == (whole[7:], 1)
  assert build(19) == (whole[7:], 1)
  assert build(18) == (whole[14:], 2)
  assert build(5) == ('asked', 3)
  with pytest.raises(InputError, match=r't\.csv:5: .* 5 tokens .* room for 4'):
    build(4)
  with pytest.raises(InputError, match=r'room for 0'):
    build(-3)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (' Yes', 'Yes'),
    ('no.', 'No'),
    (' "YES", they are\nNo', 'Yes'),
    (' **No**', 'No'),
    (' Nothing', None),
    ('yesterday', None),
    ('\nYes', None),
    (' The answer is Yes', None),
    ('', None),
    ('1', None),
  ],
)
def test_read_yes_or_no(text, expected):
  assert wrangle.read_answer('match', text) == expected
  assert wrangle.read_answer('errors', text) == expected


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (' New  York\nQuestion', 'New York'),
    (' "Leeds".', 'Leeds'),
    ("O'Hare, Chicago", "O'Hare, Chicago"),
    ('Yes', 'Yes'),
    ('\nLeeds', None),
    (' "."', None),
  ],
)
def test_read_value(text, expected):
  assert wrangle.read_answer('impute', text) == expected


Y, N = 'Yes', 'No'


@pytest.mark.parametrize(
  ('predictions', 'answers', 'expected'),
  [
    # Three said, two of them right; four true; one answer unknown.
    ([Y, Y, Y, N, None, N, Y], [Y, Y, N, Y, Y, N, None], (2 / 3, 1 / 2, 4 / 7)),
    ([Y, N], [Y, N], (1.0, 1.0, 1.0)),
    ([Y, Y], [N, N], (0.0, None, 0.0)),
    ([None, N], [Y, N], (None, 0.0, 0.0)),
    ([N, None], [N, N], (None, None, None)),
    ([Y], [None], (None, None, None)),
    ([], [], (None, None, None)),
  ],
)
def test_figures_of_yes_and_no(predictions, answers, expected):
  figures = wrangle.measure('errors', predictions, answers)
  assert figures == wrangle.measure('match', predictions, answers)
  assert list(figures) == ['precision', 'recall', 'f1']
  assert tuple(figures.values()) == pytest.approx(expected)


def test_accuracy():
  predictions = ['leeds', 'New York', 'U.S', 'York', None, 'Bath']
  answers = ['Leeds', 'new  york', '"U.S."', 'Bath', 'Bath', None]
  figures = wrangle.measure('impute', predictions, answers)
  assert figures == {'accuracy': 3 / 5}
  nothing = wrangle.measure('impute', ['a'], [None])
  assert nothing == {'accuracy': None}


class Oracle:
  """Has a context of 133 characters and says what it is told to."""

  def __init__(self, says):
    self.says, self.prompts = says, []
    self.config = SimpleNamespace(max_positions=133)
    self.tokenizer = SimpleNamespace(encode=list)

  def generate(self, prompts, params):
    self.prompts, self.params = prompts, params
    return [SimpleNamespace(text=text) for text in self.says]


def test_run():
  rows = wrangle.examples('match', table(PAIRS))
  shots = [Example('', 'Same?', Y), Example('', 'And these?', N)]
  llm = Oracle([' Yes.', ' Perhaps', ' no'])
  result = wrangle.run(llm, 'match', rows, shots)
  lengths = [len(row.question) for row in rows]
  assert lengths == [102, 96, 104]
  # Both examples have 11 + 15 characters, and a prompt at most 133 - 4.
  start = 'And these? No\n\n'
  assert llm.prompts == [
    f'Same? Yes\n\n{start}{rows[0].question}',
    f'Same? Yes\n\n{start}{rows[1].question}',
    f'{start}{rows[2].question}',
  ]
  assert (llm.params.max_new_tokens, llm.params.temperature) == (4, 0)
  assert result.predictions == [Y, None, N]
  assert result.generated == [' Yes.', ' Perhaps', ' no']
  assert result.figures == {
    'precision': 1.0,
    'recall': 1.0,
    'f1': 1.0,
    'rows': 3,
    'labelled': 2,
    'unread': 1,
    'shortened_prompts': 1,
    'dropped_examples': 1,
  }


def test_not_run():
  llm = Oracle([])
  with pytest.raises(InputError, match='task must be one of'):
    wrangle.run(llm, 'join', [], [])
  llm.tokenizer = None
  with pytest.raises(InputError, match='tokenizer'):
    wrangle.run(llm, 'match', [], [])
