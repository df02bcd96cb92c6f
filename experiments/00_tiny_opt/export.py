"""Weight groups <-> a Hugging Face OPT checkpoint, and its small files.

It hides the checkpoint's names and layout from training.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load_file, save_file

from flexjax.config import ModelConfig
from flexjax.models import opt

Weights = Sequence[Mapping[str, np.ndarray]]

_PREFIX = 'model.decoder.'
_QKV = ('q_proj', 'k_proj', 'v_proj')
_TOKEN = {'lstrip': False, 'rstrip': False, 'single_word': False}


def to_checkpoint(
  config: ModelConfig, weights: Weights, dtype: str
) -> dict[str, np.ndarray]:
  """Returns the checkpoint's tensors by name; the head is tied, so no head."""
  out = {
    'embed_tokens.weight': weights[0]['table'],
    'embed_positions.weight': weights[1]['positions'],
  }
  for n in range(config.num_layers):
    at = f'layers.{n}.'
    attention, mlp = weights[2 + 2 * n], weights[3 + 2 * n]
    v = _unpack(config, 'attention', attention['vectors'])
    for part, name in enumerate(_QKV):
      rows = slice(part * config.hidden_size, (part + 1) * config.hidden_size)
      out[f'{at}self_attn.{name}.weight'] = attention['qkv'][rows]
      out[f'{at}self_attn.{name}.bias'] = v['qkv'][rows]
    out[f'{at}self_attn.out_proj.weight'] = attention['out']
    out[f'{at}self_attn.out_proj.bias'] = v['out']
    out[f'{at}self_attn_layer_norm.weight'] = v['scale']
    out[f'{at}self_attn_layer_norm.bias'] = v['offset']
    v = _unpack(config, 'mlp', mlp['vectors'])
    for name in ('fc1', 'fc2'):
      out[f'{at}{name}.weight'] = mlp[name]
      out[f'{at}{name}.bias'] = v[name]
    out[f'{at}final_layer_norm.weight'] = v['scale']
    out[f'{at}final_layer_norm.bias'] = v['offset']
  v = _unpack(config, 'head', weights[-1]['vectors'])
  out['final_layer_norm.weight'] = v['scale']
  out['final_layer_norm.bias'] = v['offset']
  return {_PREFIX + k: np.ascontiguousarray(a, dtype) for k, a in out.items()}


def from_checkpoint(
  config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
  """Returns float32 weight groups; the inverse of `to_checkpoint`."""

  def get(*names):
    arrays = [tensors[_PREFIX + name] for name in names]
    return np.concatenate(arrays).astype(np.float32)

  groups = [
    {'table': get('embed_tokens.weight')},
    {'positions': get('embed_positions.weight')},
  ]
  for n in range(config.num_layers):
    at = f'layers.{n}.'
    attn = f'{at}self_attn.'
    norm = (
      f'{at}self_attn_layer_norm.weight',
      f'{at}self_attn_layer_norm.bias',
    )
    groups.append(
      {
        'qkv': get(*(f'{attn}{name}.weight' for name in _QKV)),
        'out': get(f'{attn}out_proj.weight'),
        'vectors': get(
          *norm,
          *(f'{attn}{name}.bias' for name in _QKV),
          f'{attn}out_proj.bias',
        ),
      }
    )
    norm = (f'{at}final_layer_norm.weight', f'{at}final_layer_norm.bias')
    groups.append(
      {
        'fc1': get(f'{at}fc1.weight'),
        'fc2': get(f'{at}fc2.weight'),
        'vectors': get(*norm, f'{at}fc1.bias', f'{at}fc2.bias'),
      }
    )
  norm = ('final_layer_norm.weight', 'final_layer_norm.bias')
  return [*groups, {'vectors': get(*norm)}]


def write(
  folder: pathlib.Path,
  config: ModelConfig,
  weights: Weights,
  text: pathlib.Path,
) -> None:
  """Writes a checkpoint in float16 with the tokenizer found in `text`."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file(
    to_checkpoint(config, weights, 'float16'),
    folder / 'model.safetensors',
    {'format': 'pt'},
  )
  for name in ('vocab.json', 'merges.txt'):
    (folder / name).write_bytes((text / name).read_bytes())
  for name, record in _records(config).items():
    (folder / name).write_text(json.dumps(record, indent=2) + '\n')


def read(
  folder: pathlib.Path, config: ModelConfig
) -> list[dict[str, np.ndarray]]:
  """Returns the weight groups of a checkpoint written by `write`."""
  return from_checkpoint(config, load_file(folder / 'model.safetensors'))


def config_of(folder: pathlib.Path) -> ModelConfig:
  """Returns the configuration of a checkpoint written by `write`."""
  record = json.loads((folder / 'config.json').read_text())
  return ModelConfig(
    num_layers=record['num_hidden_layers'],
    num_heads=record['num_attention_heads'],
    hidden_size=record['hidden_size'],
    ffn_size=record['ffn_dim'],
    embed_size=record['word_embed_proj_dim'],
    vocab_size=record['vocab_size'],
    max_positions=record['max_position_embeddings'],
  )


def _unpack(config, kind, vectors):
  sizes = opt.vector_sizes(config, kind)
  ends = np.cumsum(list(sizes.values()))[:-1]
  return dict(zip(sizes, np.split(vectors, ends), strict=True))


def _records(config: ModelConfig) -> dict[str, dict]:
  """Returns what the small JSON files say, as OPT repositories write them."""
  end = {'content': '</s>', 'normalized': True, **_TOKEN}
  pad = {'content': '<pad>', 'normalized': True, **_TOKEN}
  tokens = {'bos_token': end, 'eos_token': end, 'unk_token': end}
  tokens['pad_token'] = pad
  ids = {
    'bos_token_id': config.bos_id,
    'eos_token_id': config.eos_id,
    'pad_token_id': config.pad_id,
  }
  model = {
    'architectures': ['OPTForCausalLM'],
    'model_type': 'opt',
    'activation_function': config.activation,
    'attention_dropout': 0.0,
    'do_layer_norm_before': config.pre_layer_norm,
    'dropout': 0.1,
    'enable_bias': config.bias,
    'ffn_dim': config.ffn_size,
    'hidden_size': config.hidden_size,
    'init_std': 0.02,
    'layer_norm_elementwise_affine': config.norm_affine,
    'layerdrop': 0.0,
    'max_position_embeddings': config.max_positions,
    'num_attention_heads': config.num_heads,
    'num_hidden_layers': config.num_layers,
    'prefix': '</s>',
    'tie_word_embeddings': config.tied_head,
    'torch_dtype': 'float16',
    'use_cache': True,
    'vocab_size': config.vocab_size,
    'word_embed_proj_dim': config.embed_size,
    **ids,
  }
  return {
    'config.json': model,
    'generation_config.json': {'_from_model_config': True, **ids},
    'special_tokens_map.json': tokens,
    'tokenizer_config.json': {
      'add_bos_token': True,
      'add_prefix_space': False,
      'errors': 'replace',
      'model_max_length': config.max_positions,
      'tokenizer_class': 'GPT2Tokenizer',
      **{k: {'__type': 'AddedToken', **v} for k, v in tokens.items()},
    },
  }
