"""Files are written whole or not at all, and nothing else is touched."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexjax import atomic


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'figures.json'


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
  atomic.write(path, ['old'])

  def full(self, target):
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(Path, 'replace', full)
    with pytest.raises(OSError, match='disk full'):
      atomic.write(path, ['new'])
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  assert path.read_text() == 'old'


def test_parts_that_end_early_leave_the_old_file(path):
  def parts():
    yield 'half'
    raise KeyboardInterrupt

  atomic.write(path, ['old'])
  with pytest.raises(KeyboardInterrupt):
    atomic.write(path, parts())
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  assert path.read_text() == 'old'


KILLED = """
import os, sys
from flexjax import atomic
with atomic.replaced(sys.argv[1], alone=True) as new:
  new.write_text('half')
  os._exit(0)
"""


def test_what_a_killed_writer_left_is_taken_up(path):
  subprocess.run([sys.executable, '-c', KILLED, path], check=True)
  (left,) = path.parent.iterdir()
  assert left.read_text() == 'half'
  atomic.write(path, ['whole'], alone=True)
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  assert path.read_text() == 'whole'


@pytest.mark.parametrize('sync', [False, True])
def test_what_is_named_alike_is_not_touched(path, sync):
  others = [path.with_name(path.name + end) for end in ('.new', '.tmp', '~')]
  for other in others:
    other.write_text("somebody's")
  atomic.write(path, ['a', 'b'], sync=sync)
  assert path.read_text() == 'ab'
  assert [other.read_text() for other in others] == 3 * ["somebody's"]
  assert len(list(path.parent.iterdir())) == 4


@pytest.mark.parametrize('alone', [False, True])
def test_a_name_may_be_as_long_as_names_may_be(path, alone):
  path = path.with_name(255 * 'n')
  atomic.write(path, ['a'], alone=alone)
  assert path.read_text() == 'a'


def test_what_a_link_points_to_is_written(path):
  link = path.with_name('link')
  link.symlink_to(path)
  atomic.write(link, ['a'])
  assert link.is_symlink()
  assert path.read_text() == 'a'


def test_a_pipe_is_written_to_and_stays(path):
  os.mkfifo(path)
  got = []
  reader = threading.Thread(target=lambda: got.append(path.read_text()))
  reader.start()
  atomic.write(path, ['a', 'b'])
  reader.join()
  assert got == ['ab']
  assert path.is_fifo()
