"""Finding checkpoints; the hub itself is never asked."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from flexjax.errors import InputError
from flexjax.models.hub import find_checkpoint

TOKENIZER = ('vocab.json', 'merges.txt', 'tokenizer_config.json')
OTHERS = ('README.md', 'flax_model.msgpack', 'tf_model.h5', 'onnx/model.onnx')
SHARDS = (
  'model-00001-of-00002.safetensors',
  'model-00002-of-00002.safetensors',
)
BIN_SHARDS = (
  'pytorch_model-00001-of-00001.bin',
  'pytorch_model.bin.index.json',
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty local cache and no network."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  return tmp_path / 'hub'


def fill(cache, names):
  """Writes a snapshot of org/opt into the cache."""
  root = cache / 'models--org--opt'
  snapshot = root / 'snapshots' / 'abc'
  for name in names:
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / name).write_text('{"model_type": "opt"}')
  index = {'weight_map': dict(zip('ab', SHARDS, strict=True))}
  if 'model.safetensors.index.json' in names:
    path = snapshot / 'model.safetensors.index.json'
    path.write_text(json.dumps(index))
  (root / 'refs').mkdir(exist_ok=True)
  (root / 'refs' / 'main').write_text('abc')
  return snapshot


def test_directories_come_first(tmp_path, monkeypatch, cache):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org' / 'opt').mkdir(parents=True)
  fill(cache, ['config.json', *TOKENIZER, 'model.safetensors'])
  assert find_checkpoint('org/opt') == Path('org/opt')
  assert find_checkpoint(str(tmp_path)) == tmp_path
  monkeypatch.setenv('HOME', str(tmp_path))
  assert find_checkpoint('~/org') == tmp_path / 'org'


@pytest.mark.parametrize(
  'name',
  ['opt', '/none/such', './org/opt', 'a/b/c', '', 'org/', '../opt', 'a b/c'],
)
def test_neither_directory_nor_hub_id(cache, name):
  with pytest.raises(InputError, match='neither a directory nor a hub id'):
    find_checkpoint(name)


def test_a_file_is_no_directory(tmp_path, monkeypatch, cache):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org').mkdir()
  (tmp_path / 'org' / 'opt').touch()
  with pytest.raises(InputError, match='neither a directory'):
    find_checkpoint('org/opt')


@pytest.mark.parametrize(
  'names',
  [
    ['config.json', *TOKENIZER, 'model.safetensors'],
    ['config.json', 'tokenizer.json', 'pytorch_model.bin'],
    ['config.json', *TOKENIZER, 'model.safetensors.index.json', *SHARDS],
  ],
)
def test_cached(cache, names):
  snapshot = fill(cache, names)
  assert find_checkpoint('org/opt') == snapshot


@pytest.mark.parametrize(
  'names',
  [
    [],
    [*TOKENIZER, 'model.safetensors'],
    ['config.json', 'model.safetensors'],
    ['config.json', *TOKENIZER],
    ['config.json', *TOKENIZER, 'model.safetensors.index.json', SHARDS[0]],
  ],
)
def test_offline_and_not_all_of_it_cached(cache, names):
  if names:
    fill(cache, names)
  with pytest.raises(InputError, match='OfflineModeIsEnabled') as e:
    find_checkpoint('org/opt')
  assert '\n' not in str(e.value)


def test_hub_that_cannot_be_reached(tmp_path):
  code = (
    'from flexjax.models.hub import find_checkpoint\n'
    'try:\n  find_checkpoint("org/opt")\n'
    'except ValueError as e:\n  print(type(e).__name__, e)\n'
  )
  env = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path)}
  gone = ('http_proxy', 'https_proxy', 'all_proxy')
  base = {n: v for n, v in os.environ.items() if n.lower() not in gone}
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=base | env,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  assert done.stdout.startswith("InputError there is no directory 'org/opt'")
  assert 'cannot be downloaded: ConnectError' in done.stdout
  assert done.stdout.count('\n') == 1


@pytest.fixture
def hub(tmp_path, monkeypatch, cache):
  """A hub whose files the test chooses; remembers what was fetched."""

  class Hub:
    names = ()
    config = '{"model_type": "opt"}'
    fetched = ()

    def model_info(self, model):
      assert model == 'org/opt'
      names = ['config.json', *self.names, *OTHERS]
      files = [types.SimpleNamespace(rfilename=n) for n in names]
      return types.SimpleNamespace(siblings=files)

    def snapshot_download(self, model, allow_patterns, local_files_only=False):
      if local_files_only:
        raise FileNotFoundError
      self.fetched = allow_patterns
      (tmp_path / 'config.json').write_text(self.config)
      return str(tmp_path)

  fake = Hub()
  for name in ('model_info', 'snapshot_download'):
    monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
  return fake


@pytest.mark.parametrize(
  ('names', 'weights'),
  [
    (['model.safetensors', 'pytorch_model.bin'], ['model.safetensors']),
    (
      ['model.safetensors.index.json', *SHARDS, *BIN_SHARDS],
      ['model.safetensors.index.json', *SHARDS],
    ),
    (['pytorch_model.bin'], ['pytorch_model.bin']),
    (BIN_SHARDS, BIN_SHARDS),
  ],
)
def test_download_takes_one_kind_of_weights(hub, tmp_path, names, weights):
  hub.names = (*names, *TOKENIZER)
  assert find_checkpoint('org/opt') == tmp_path
  assert hub.fetched == sorted([*weights, *TOKENIZER, 'config.json'])


def test_no_weights_are_fetched_of_other_models(hub):
  hub.names = ('model.safetensors',)
  hub.config = '{"model_type": "llama"}'
  with pytest.raises(InputError, match='model_type is "llama"'):
    find_checkpoint('org/opt')
  assert hub.fetched == ['config.json']
  hub.config, hub.names = '{"model_type": "opt"}', ()
  with pytest.raises(InputError, match='no weights that flexjax reads'):
    find_checkpoint('org/opt')


@pytest.mark.parametrize(
  ('kind', 'message'),
  [('RepositoryNotFoundError', 'no such model'), ('GatedRepoError', 'gated')],
)
def test_refusals_of_the_hub(hub, monkeypatch, kind, message):
  error = getattr(huggingface_hub.errors, kind)

  def refuse(model):
    raise error.__new__(error)

  monkeypatch.setattr(huggingface_hub, 'model_info', refuse)
  with pytest.raises(InputError, match=message):
    find_checkpoint('org/opt')
