"""What is committed stays, what is not goes; one job at a time."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest

from flexjax import InputError
from flexjax.apps import journal as journals
from flexjax.apps.journal import Journal, committed

ABOUT = {'input': 'digest', '--seed': 3, '--stop': ('a',)}


def test_a_job_goes_on_where_it_stopped(tmp_path):
  path = tmp_path / 'out.jsonl'
  assert committed(path) is None
  journal = Journal(path, ABOUT)
  assert journal.done is None
  journal.commit(['{"a": 1}', '{"b": "ü"}'], {'steps': 1})
  journal.close()
  with open(path, 'ab') as file:  # killed while it wrote
    file.write(b'{"c": ')
  assert committed(path) == {'steps': 1}
  again = Journal(path, ABOUT)
  assert again.done == {'steps': 1}
  again.commit(['{"c": 3}'], {'steps': 2})
  again.close()
  lines = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  assert lines == [{'a': 1}, {'b': 'ü'}, {'c': 3}]


def test_lines_without_a_commit_are_cut_off(tmp_path):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['1'], 1)
  journal.close()
  with open(path, 'a') as file:
    file.write('2\n3\n')  # synced, but the journal had no time
  Journal(path, ABOUT).close()
  assert path.read_text() == '1\n'


@pytest.mark.parametrize('name', ABOUT)
def test_another_job_is_refused(tmp_path, name):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['1'], 1)
  journal.close()
  with pytest.raises(InputError, match=f'another {name}'):
    Journal(path, ABOUT | {name: 'other'})
  assert path.read_text() == '1\n'


def test_a_job_that_did_nothing_binds_nobody(tmp_path):
  path = tmp_path / 'out.jsonl'
  Journal(path, ABOUT).close()  # and was refused, or stopped
  other = {**ABOUT, '--seed': 4}
  journal = Journal(path, other)
  journal.commit(['1'], 1)
  journal.close()
  with pytest.raises(InputError, match='begun with another --seed'):
    Journal(path, ABOUT)


def test_two_jobs_on_one_output_are_refused(tmp_path):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  with pytest.raises(InputError, match='another job is writing'):
    Journal(path, ABOUT)
  journal.close()
  Journal(path, ABOUT).close()


def test_results_of_something_else_are_left_alone(tmp_path):
  path = tmp_path / 'out.jsonl'
  path.write_text('precious\n')
  with pytest.raises(InputError, match='not this job'):
    Journal(path, ABOUT)
  assert path.read_text() == 'precious\n'
  assert not (tmp_path / 'out.jsonl.job').exists()


def test_results_that_lost_lines_are_refused(tmp_path):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['1', '2'], 1)
  journal.close()
  path.write_text('1\n')
  with pytest.raises(InputError, match='lost lines'):
    Journal(path, ABOUT)
  (tmp_path / 'out.jsonl.job').write_text('{')
  with pytest.raises(InputError, match='cannot be read'):
    Journal(path, ABOUT)


def test_no_place_to_write(tmp_path):
  with pytest.raises(InputError, match='cannot be written'):
    Journal(tmp_path / 'absent' / 'out.jsonl', ABOUT)


def test_what_is_kept_aside_survives_until_the_next_commit(tmp_path):
  path = tmp_path / 'out.jsonl'
  aside = tmp_path / 'out.jsonl.job.kept'
  journal = Journal(path, ABOUT)
  journal.keep(['3 c', '1 ü'], 1)
  journal.close()
  with open(aside, 'ab') as file:  # killed while it wrote
    file.write(b'2 b')
  again = Journal(path, ABOUT)
  assert again.done == 1
  again.keep(['2 b\u2028'], 2)
  assert again.kept() == ['3 c', '1 ü', '2 b\u2028']
  assert path.read_text() == ''
  again.commit(['a', 'b'], 3)
  assert again.kept() == []
  again.close()
  assert sorted(tmp_path.iterdir()) == [path, tmp_path / 'out.jsonl.job']
  aside.write_text('of a kill between the two\n')
  last = Journal(path, ABOUT)
  assert last.kept() == []
  last.keep(['4 d'], 4)
  assert last.kept() == ['4 d']
  last.close()
  aside.write_text('')
  with pytest.raises(InputError, match='lost lines'):
    Journal(path, ABOUT)


KILLED = """
import os, pathlib, sys
from flexjax.apps.journal import Journal
journal = Journal(pathlib.Path(sys.argv[1]), eval(sys.argv[2]))
pathlib.Path.replace = lambda *_: os._exit(9)
journal.commit(['1'], 1)
"""


def test_a_kill_leaves_nothing_for_good(tmp_path):
  path = tmp_path / 'out.jsonl'
  command = [sys.executable, '-c', KILLED, path, repr(ABOUT)]
  done = subprocess.run(command, check=False)
  assert done.returncode == 9
  assert len(list(tmp_path.iterdir())) == 3
  journal = Journal(path, ABOUT)
  assert journal.done is None
  journal.commit(['1'], 1)
  journal.close()
  assert sorted(tmp_path.iterdir()) == [path, tmp_path / 'out.jsonl.job']


def test_nothing_is_written_behind_what_failed(tmp_path, monkeypatch):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['a'], 1)

  def full(number):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(InputError, match='No space left on device; what is'):
      journal.commit(['b'], 2)
  assert journal.done == 1
  for write in (journal.commit, journal.keep):
    with pytest.raises(InputError, match='before'):
      write(['c'], 3)
  journal.close()
  again = Journal(path, ABOUT)
  assert again.done == 1
  again.commit(['b'], 2)
  again.close()
  assert path.read_text() == 'a\nb\n'


def change(path, old, new):
  text = path.read_bytes()
  assert old in text
  path.write_bytes(text.replace(old, new))


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    ('out.jsonl.job', b'"steps": 1', b'"steps": 2'),
    ('out.jsonl.job', b'"bytes": 2', b'"bytes": -1'),
    ('out.jsonl.job', b'"kept": 4', b'"kept": 2'),
    ('out.jsonl.job.kept', b'1 b', b'abc'),
  ],
)
def test_what_is_damaged_is_refused(tmp_path, name, old, new):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['a'], None)
  journal.keep(['1 b'], {'steps': 1})
  journal.close()
  change(tmp_path / name, old, new)
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  with pytest.raises(InputError, match=f'{name}. is damaged'):
    Journal(path, ABOUT)
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_refusal_leaves_no_file(tmp_path):
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['1'], 1)
  journal.close()
  path.unlink()
  with pytest.raises(InputError, match='lost lines'):
    Journal(path, ABOUT)
  assert not path.exists()
  with pytest.raises(InputError, match='not a file'):
    Journal(tmp_path, ABOUT)


def test_a_file_system_may_not_sync_directories(tmp_path, monkeypatch):
  fsync = os.fsync

  def files_only(number):
    if stat.S_ISDIR(os.fstat(number).st_mode):
      raise OSError(errno.EINVAL, 'Invalid argument')
    fsync(number)

  monkeypatch.setattr(os, 'fsync', files_only)
  path = tmp_path / 'out.jsonl'
  journal = Journal(path, ABOUT)
  journal.commit(['a'], 1)
  journal.close()
  assert path.read_text() == 'a\n'


def test_a_job_that_comes_between_keeps_its_results(tmp_path, monkeypatch):
  path = tmp_path / 'out.jsonl'
  read, other = journals._read, []

  def read_late(state):
    """Another job begins, right after this one has found no results."""
    found = read(state)
    if not other:
      other.append(None)
      other[0] = Journal(path, ABOUT)
    return found

  monkeypatch.setattr(journals, '_read', read_late)
  with pytest.raises(InputError, match='another job is writing'):
    Journal(path, ABOUT)
  other[0].commit(['1'], 1)
  other[0].close()
  assert path.read_text() == '1\n'
