"""Tiny random checkpoints and what transformers makes of them."""

import dataclasses
import json
import shutil
import string

import jax
import numpy as np
import pytest
import torch
import transformers

SMALL = {
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'ffn_dim': 64,
  'vocab_size': 120,
  'max_position_embeddings': 40,
  'dropout': 0.0,
}
MODELS = {
  '125m': {},
  '350m': {'word_embed_proj_dim': 16, 'do_layer_norm_before': False},
  'galactica': {
    'activation_function': 'gelu',
    'enable_bias': False,
    'layer_norm_elementwise_affine': True,
    'vocab_size': 97,
    'bos_token_id': 0,
  },
  'no affine': {
    'layer_norm_elementwise_affine': False,
    '_remove_final_layer_norm': True,
    'num_hidden_layers': 3,
  },
  'untied': {'tie_word_embeddings': False, 'hidden_size': 48},
}
LENGTHS = (5, 1, 13, 8, 2, 9, 1, 11, 16)
NEW_TOKENS = (6, 1, 9, 3, 9, 2, 7, 4, 9)


def make_checkpoint(path, std=0.2, seed=0, **changes):
  """Saves a model whose weights are all drawn at random; returns it."""
  torch.manual_seed(seed)
  config = transformers.OPTConfig(**{**SMALL, **changes})
  model = transformers.OPTForCausalLM(config).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.normal_(float('norm.weight' in name), std)
  model.save_pretrained(path)
  return model


def save_tokenizer(path):
  """Adds a tokenizer that knows some characters and merges none."""
  special = ['<s>', '<pad>', '</s>', '<unk>']
  tokens = special + list(string.ascii_letters + string.digits + ',.!?:;-')
  ids = {token: n for n, token in enumerate(tokens)}
  (path / 'vocab.json').write_text(json.dumps(ids))
  (path / 'merges.txt').write_text('#version: 0.2\n')


def make_prompts(vocab_size, lengths=LENGTHS, seed=0):
  """Random ids; some prompts hold the ids that mean padding and eos."""
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(3, vocab_size, n).tolist() for n in lengths]
  prompts[0][2] = 1
  prompts[2][:2] = [2, 2]
  return prompts


def logits_of(model, ids):
  """Returns float64 logits [T, V] of one row, without padding."""
  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].double()


def greedy(model, prompt, new_tokens):
  """Continues one row by the likeliest token, no cache, no padding.

  Returns None where two tokens are all but equally likely.
  """
  ids = list(prompt)
  for _ in range(new_tokens):
    last = logits_of(model, ids)[-1]
    top = last.topk(2).values
    if top[0] - top[1] < 1e-3:
      return None
    ids.append(int(last.argmax()))
  return ids[len(prompt) :]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint's directory, prompts, and what is right for them."""

  path: str
  model: transformers.OPTForCausalLM
  prompts: list[list[int]]
  logprobs: list[np.ndarray]
  tokens: list[list[int]]


@pytest.fixture(scope='session', autouse=True)
def _compile_once(tmp_path_factory):
  """Lets models of one shape share what XLA has compiled."""
  options = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
  """Returns a function that makes the named model of MODELS, once."""
  made = {}

  def get(name) -> Checkpoint:
    if name not in made:
      path = tmp_path_factory.mktemp('checkpoint')
      made[name] = _make(path, MODELS[name])
      save_tokenizer(path)
    return made[name]

  return get


def _make(path, changes) -> Checkpoint:
  """Takes the first weights that leave no greedy token in doubt."""
  for seed in range(20):
    model = make_checkpoint(path, seed=seed, **changes)
    prompts = make_prompts(model.config.vocab_size)
    tokens = [greedy(model, ids, max(NEW_TOKENS)) for ids in prompts]
    if None not in tokens and len({t for row in tokens for t in row}) > 15:
      logprobs = [_logprobs(model, ids) for ids in prompts]
      return Checkpoint(str(path), model, prompts, logprobs, tokens)
  raise AssertionError('no seed gives clear winners')


def _logprobs(model, ids):
  p = logits_of(model, ids).log_softmax(-1)
  return p[range(len(ids) - 1), ids[1:]].numpy()


@pytest.fixture(scope='session')
def models(tmp_path_factory):
  """A folder with checkpoints `one`, `other` and `shards`."""
  root = tmp_path_factory.mktemp('models')
  for seed, name in enumerate(('one', 'other', 'shards')):
    model = make_checkpoint(root / name, seed=seed)
    if name == 'shards':
      (root / name / 'model.safetensors').unlink()
      model.save_pretrained(root / name, max_shard_size='20KB')
    save_tokenizer(root / name)
  return root


@pytest.fixture
def place(models, tmp_path):
  """A folder with checkpoints and a file of two prompts."""
  shutil.copytree(models, tmp_path, dirs_exist_ok=True)
  (tmp_path / 'in.jsonl').write_text('{"prompt": "ab"}\n{"prompt": [5]}\n')
  return tmp_path
