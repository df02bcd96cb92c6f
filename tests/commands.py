"""Running `flexjax` from tests, and what tests of commands share."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
STATS = {
  'prefill_seconds': None,
  'decode_seconds': None,
  'generated_tokens': None,
  'throughput_tokens_per_s': None,
  'decode_tokens_per_s': None,
  'peak_bytes': {'device', 'host', 'disk'},
  'link_bytes': {
    'disk_to_host',
    'host_to_device',
    'device_to_host',
    'host_to_disk',
  },
  'link_busy_fraction': None,
  'placement': {'weights', 'cache', 'hidden'},
  'stored': {'dtype', 'weight_bits', 'cache_bits'},
  'block': {'batch_size', 'num_batches', 'attention'},
  'compilations': None,
  'load_seconds': None,
  'predicted': {
    'prefill_seconds',
    'decode_seconds',
    'throughput_tokens_per_s',
    'busy',
    'binding',
    'peak_bytes',
    'link_bytes',
    'planned_bytes',
  },
}
FIELDS = ['index', 'prompt', 'text', 'token_ids', 'finish_reason']
SMALL_DISK = """
import shutil
whole = shutil.disk_usage('/')
shutil.disk_usage = lambda path: whole._replace(free=4096)
"""
# Refused before weights are read, or there is an error.
NO_WEIGHTS = """
from flexjax.runtime.loaded import LoadedModel
LoadedModel._fill = None
"""


@dataclasses.dataclass(frozen=True)
class Done:
  """A command that has ended."""

  code: int
  stdout: str
  stderr: str


def environment() -> dict[str, str]:
  """The environment of a command: of this moment, for conftest changes it."""
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'HF_HUB_OFFLINE': '1',
    'PYTHONWARNINGS': 'ignore',
  }


@contextlib.contextmanager
def forks(folder) -> Iterator[Callable[..., Done]]:
  """Yields a function that runs `flexjax ARGUMENTS` in a fork."""
  with subprocess.Popen(
    [sys.executable, HERE / 'forks.py'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=environment(),
    text=True,
  ) as server:

    def run(*argv, patch='') -> Done:
      job = {'argv': list(map(str, argv)), 'folder': str(folder)}
      print(json.dumps(job | {'patch': patch}), file=server.stdin, flush=True)
      code = int(server.stdout.readline())
      texts = [(folder / n).read_text() for n in ('stdout', 'stderr')]
      return Done(code, *texts)

    yield run
    server.stdin.close()


def start(*argv, **kwargs):
  command = [sys.executable, '-m', 'flexjax', *map(str, argv)]
  return subprocess.Popen(
    command,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def wait_for(process, condition):
  """Returns once the condition holds; fails where the process ends first."""
  until = time.monotonic() + 60
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < until
    time.sleep(0.005)


def snapshot(folder):
  return {
    path.relative_to(folder): path.is_file() and path.read_bytes()
    for path in folder.rglob('*')
  }


def refuses(done, expected):
  """Asserts that bad input gave exit code 2 and one clear line."""
  assert 'Traceback' not in done.stderr, done.stderr
  assert re.fullmatch(r'flexjax: [^\n]+\n', done.stderr), done.stderr
  assert re.search(expected, done.stderr), done.stderr
  assert done.code == 2
  assert done.stdout == ''


def lines(path):
  text = path.read_text(encoding='utf-8')
  assert text.endswith('\n')
  return [json.loads(line) for line in text[:-1].split('\n')]


def edit(file, **changes):
  def change(folder):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def write(file, content):
  def change(folder):
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      path.write_text(content)

  return change


def shard(action):
  def change(folder):
    file = sorted((folder / 'shards').glob('*00002*.safetensors'))[0]
    data = file.read_bytes()
    file.unlink()
    if action == 'truncate':
      file.write_bytes(data[:-10])

  return change


def jsonl(*prompts):
  return write('in.jsonl', ''.join(line + '\n' for line in prompts))


def weights_in(disk):
  """Everything that a disk tier holds, without times and lists of files."""
  return {
    path.relative_to(disk): path.read_bytes()
    for path in disk.rglob('*')
    if path.is_file()
  }


def has_weights(manifest):
  """The folder is claimed before the first weights are there."""
  return manifest.exists() and json.loads(manifest.read_text())['complete']
