"""CSV in and out, and rows in words."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.apps import tables
from flexjax.errors import InputError


def test_parse():
  text = '\ufeffname , city\r\n"a, ""b""","x\ny"\r\n\r\n , \nc, d \n'
  table = tables.parse(text, 't.csv')
  assert table.columns == ('name', 'city')
  assert table.rows == [
    {'name': 'a, "b"', 'city': 'x\ny'},
    {'name': 'c', 'city': ' d '},
  ]
  assert table.places == ['t.csv:2', 't.csv:6']


REFUSED = {
  'empty': ('', r"'t.csv' is empty"),
  'blank': ('\n , \n', r"'t.csv' is empty"),
  'no rows': ('a,b\n\n', r"'t.csv' has a header but no rows"),
  'column without a name': ('a, ,b\n1,2,3\n', r'column 2 .* no name'),
  'two of a name': ('a,b,a \n1,2,3\n', r"two columns 'a'"),
  'too few cells': ('a,b\n1,2\n"3\n4"\n', r't\.csv:3: expected 2 .* got 1$'),
  'too many cells': ('a,b\n1,2,3\n', r't\.csv:2: expected 2 .* got 3$'),
  'open quotes': ('a,b\n1,2\n3,"4\n', r't\.csv:3: not CSV'),
  'text after quotes': ('a,b\n"1"2,3\n', r't\.csv:2: not CSV'),
}


@pytest.mark.parametrize('case', REFUSED.values(), ids=REFUSED)
def test_not_parsed(case):
  text, expected = case
  with pytest.raises(InputError, match=expected):
    tables.parse(text, 't.csv')


cells = st.text(st.characters(codec='utf-8', exclude_characters='\0'))
seen = st.text('ab ,"\n\r\u2028;', min_size=1).map(lambda text: f'x{text}')


@given(st.lists(st.tuples(seen, cells), min_size=1))
def test_what_is_written_is_read_again(pairs):
  rows = [{'a': a, 'b b': b} for a, b in pairs]
  text = tables.to_csv(['a', 'b b'], rows)
  assert tables.parse(text, 't.csv').rows == rows
  assert list(csv.DictReader(io.StringIO(text, newline=''))) == rows


def test_serialise():
  fields = {'name': ' Blue  Door\nLtd. ', 'a b': '3', 'gone': ' ', 'n': '0'}
  assert tables.serialise(fields) == 'name: Blue Door Ltd. a b: 3. n: 0.'
  assert tables.serialise({'a': '', 'b': ' '}) == ''
