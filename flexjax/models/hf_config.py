"""Reads `config.json` of the OPT family (OPT, OPT-IML, Galactica).

It hides Hugging Face's field names and defaults from the rest. A field is
understood, known not to change inference, or refused by name: a model that
differs from what `opt.py` computes must not run and give plausible text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexjax.config import DTYPE_BYTES, ModelConfig
from flexjax.errors import InputError
from flexjax.models.opt import ACTIVATIONS

# field of config.json -> field of ModelConfig, default of OPT
_SIZES = {
  'num_hidden_layers': ('num_layers', 12),
  'num_attention_heads': ('num_heads', 12),
  'hidden_size': ('hidden_size', 768),
  'ffn_dim': ('ffn_size', 3072),
  'vocab_size': ('vocab_size', 50272),
  'max_position_embeddings': ('max_positions', 2048),
}
_FLAGS = {
  'do_layer_norm_before': ('pre_layer_norm', True),
  'enable_bias': ('bias', True),
  'layer_norm_elementwise_affine': ('norm_affine', True),
  'tie_word_embeddings': ('tied_head', True),
}
_TOKENS = {
  'bos_token_id': ('bos_id', 2),
  'eos_token_id': ('eos_id', 2),
  'pad_token_id': ('pad_id', 1),
}
_OTHERS = {
  'model_type',
  'activation_function',
  'word_embed_proj_dim',
  '_remove_final_layer_norm',
  'dtype',
  'torch_dtype',
}
# Supported with these values only: OPT computes nothing else.
_FIXED: dict[str, Any] = {
  'learned_embeddings': True,
  'scale_embeddings': False,
  'is_encoder_decoder': False,
  'add_cross_attention': False,
  'cross_attention_hidden_size': None,
  'tie_encoder_decoder': False,
  'pruned_heads': {},
  'quantization_config': None,
  'rope_scaling': None,
  'sliding_window': None,
}
# Training, bookkeeping and defaults of generation, which requests override.
_IGNORED = {
  '_attn_implementation',
  '_attn_implementation_autoset',
  '_commit_hash',
  '_flash_attn_2_enabled',
  '_name_or_path',
  'activation_dropout',
  'architectures',
  'attn_implementation',
  'attention_dropout',
  'auto_map',
  'bad_words_ids',
  'begin_suppress_tokens',
  'chunk_size_feed_forward',
  'decoder_start_token_id',
  'diversity_penalty',
  'do_sample',
  'dropout',
  'early_stopping',
  'encoder_no_repeat_ngram_size',
  'experts_implementation',
  'exponential_decay_length_penalty',
  'finetuning_task',
  'forced_bos_token_id',
  'forced_eos_token_id',
  'gradient_checkpointing',
  'id2label',
  'init_std',
  'is_decoder',
  'label2id',
  'layerdrop',
  'length_penalty',
  'max_length',
  'min_length',
  'model_name',
  'name',
  'no_repeat_ngram_size',
  'num_beam_groups',
  'num_beams',
  'num_return_sequences',
  'output_attentions',
  'output_hidden_states',
  'output_scores',
  'prefix',
  'problem_type',
  'remove_invalid_values',
  'repetition_penalty',
  'return_dict',
  'return_dict_in_generate',
  'sep_token_id',
  'suppress_tokens',
  'task_specific_params',
  'temperature',
  'tf_legacy_loss',
  'tokenizer_class',
  'top_k',
  'top_p',
  'torchscript',
  'transformers_version',
  'typical_p',
  'unsloth_fixed',
  'unsloth_version',
  'use_bfloat16',
  'use_cache',
}


def read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    InputError: the file is missing or holds no JSON object; names it.
  """
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise InputError(f'cannot read {path}: {e.strerror}') from None
  except (ValueError, RecursionError) as e:
    raise InputError(f'{path} is not JSON: {e}') from None
  if not isinstance(fields, dict):
    raise InputError(f'{path} holds no JSON object')
  return fields


def read_config(path: Path) -> ModelConfig:
  """Returns the model that the `config.json` at `path` describes.

  Absent fields take OPT's defaults; an absent dtype reads as float32.

  Raises:
    InputError: the file cannot be read, or describes a model outside the
      family; names the file and the field.
  """
  fields = read_json(path)
  if (kind := fields.get('model_type')) != 'opt':
    raise _refusal(path, 'model_type', kind, "only 'opt' is supported")
  for name, value in fields.items():
    if name in _FIXED and value != _FIXED[name]:
      raise _refusal(
        path, name, value, f'only {json.dumps(_FIXED[name])} is supported'
      )
    known = _SIZES.keys() | _FLAGS.keys() | _TOKENS.keys() | _OTHERS
    if name not in known | _FIXED.keys() | _IGNORED:
      raise InputError(
        f"{path}: '{name}' is no field of an OPT model that flexjax knows; "
        'refused, for it may change what the model computes'
      )
  try:
    return ModelConfig(**_translate(path, fields))
  except InputError as e:
    raise e if str(path) in str(e) else InputError(f'{path}: {e}') from None


def _translate(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns ModelConfig's arguments, every value checked."""
  out: dict[str, Any] = {}
  for name, (ours, size) in _SIZES.items():
    out[ours] = _integer(path, name, fields.get(name, size), 1, None)
  for name, (ours, flag) in _FLAGS.items():
    out[ours] = _boolean(path, name, fields.get(name, flag))
  for name, (ours, token) in _TOKENS.items():
    value = fields.get(name, token)
    if isinstance(value, list) and len(value) == 1:
      value = value[0]
    if name in fields and value is None:  # the model has no such token
      out[ours] = 0 if ours == 'pad_id' else -1
      continue
    out[ours] = _integer(path, name, value, 0, out['vocab_size'])
  name = 'word_embed_proj_dim'
  width = fields.get(name)
  width = out['hidden_size'] if width is None else width
  out['embed_size'] = _integer(path, name, width, 1, None)
  name = '_remove_final_layer_norm'
  removed = _boolean(path, name, fields.get(name, False))
  out['final_layer_norm'] = out['pre_layer_norm'] and not removed
  name = 'activation_function'
  activation = fields.get(name, 'relu')
  if not isinstance(activation, str) or activation not in ACTIVATIONS:
    known = ', '.join(ACTIVATIONS)
    raise _refusal(path, name, activation, f'there are {known}')
  out['activation'] = activation
  out['checkpoint_dtype'] = _dtype(path, fields)
  return out


def _dtype(path: Path, fields: Mapping[str, Any]) -> str:
  # Newer files call the field dtype; where both occur that one counts.
  name = 'dtype' if fields.get('dtype') else 'torch_dtype'
  value = fields.get(name) or 'float32'
  text = str(value).removeprefix('torch.')
  if text not in DTYPE_BYTES:
    raise _refusal(path, name, value, f'there are {", ".join(DTYPE_BYTES)}')
  return text


def _integer(
  path: Path, name: str, value: Any, low: int, high: int | None
) -> int:
  if type(value) is int and value >= low and (high is None or value < high):
    return value
  most = '' if high is None else f' below {high}'
  raise _refusal(path, name, value, f'it must be an integer from {low}{most}')


def _boolean(path: Path, name: str, value: Any) -> bool:
  if isinstance(value, bool):
    return value
  raise _refusal(path, name, value, 'it must be true or false')


def _refusal(path: Path, name: str, value: Any, why: str) -> InputError:
  text = json.dumps(value)
  text = text if len(text) < 80 else text[:76] + ' ...'
  return InputError(f'{path}: {name} is {text}; {why}')
