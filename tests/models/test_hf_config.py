"""config.json of the OPT family, and what is refused."""

import json

import pytest
import transformers

from flexjax.config import ModelConfig
from flexjax.errors import InputError
from flexjax.models.hf_config import read_config
from flexjax.models.presets import preset

# As published with the models.
OPT_125M = {
  '_name_or_path': 'opt-125m',
  '_remove_final_layer_norm': False,
  'activation_dropout': 0.0,
  'activation_function': 'relu',
  'architectures': ['OPTForCausalLM'],
  'attention_dropout': 0.0,
  'bos_token_id': 2,
  'do_layer_norm_before': True,
  'dropout': 0.1,
  'eos_token_id': 2,
  'ffn_dim': 3072,
  'hidden_size': 768,
  'init_std': 0.02,
  'layerdrop': 0.0,
  'max_position_embeddings': 2048,
  'model_type': 'opt',
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'pad_token_id': 1,
  'prefix': '</s>',
  'torch_dtype': 'float16',
  'transformers_version': '4.21.0.dev0',
  'use_cache': True,
  'vocab_size': 50272,
  'word_embed_proj_dim': 768,
}
OPT_350M = OPT_125M | {
  'do_layer_norm_before': False,
  'ffn_dim': 4096,
  'hidden_size': 1024,
  'num_attention_heads': 16,
  'num_hidden_layers': 24,
  'word_embed_proj_dim': 512,
}
GALACTICA = OPT_125M | {
  'activation_function': 'gelu',
  'bos_token_id': 0,
  'learned_embeddings': True,
  'scale_embeddings': False,
  'vocab_size': 50000,
}


@pytest.fixture
def read(tmp_path):
  """Returns a function that writes fields to a file and reads them back."""
  path = tmp_path / 'config.json'

  def write_and_read(fields):
    text = fields if isinstance(fields, str) else json.dumps(fields)
    path.write_text(text)
    return read_config(path)

  return write_and_read


def test_published_models(read):
  assert read(OPT_125M) == preset('opt-125m')
  assert read(OPT_350M) == preset('opt-350m')
  model = read(GALACTICA)
  assert (model.activation, model.vocab_size) == ('gelu', 50000)
  assert (model.bos_id, model.eos_id, model.pad_id) == (0, 2, 1)


def test_defaults_are_those_of_transformers(read):
  bare = read({'model_type': 'opt'})
  assert bare == read(transformers.OPTConfig().to_dict())
  assert bare == ModelConfig(
    num_layers=12,
    num_heads=12,
    hidden_size=768,
    ffn_size=3072,
    embed_size=768,
    checkpoint_dtype='float32',
  )


@pytest.mark.parametrize('diff', [False, True])
def test_whatever_transformers_writes(read, diff):
  config = transformers.OPTConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=80,
    vocab_size=99,
    word_embed_proj_dim=32,
    enable_bias=False,
    layer_norm_elementwise_affine=False,
    tie_word_embeddings=False,
    activation_function='gelu_new',
    dtype='bfloat16',
  )
  assert read(config.to_json_string(use_diff=diff)) == ModelConfig(
    num_layers=3,
    num_heads=4,
    hidden_size=64,
    ffn_size=80,
    embed_size=32,
    vocab_size=99,
    activation='gelu_new',
    bias=False,
    norm_affine=False,
    tied_head=False,
    checkpoint_dtype='bfloat16',
  )


@pytest.mark.parametrize(
  ('before', 'removed', 'exists'),
  [(1, 0, True), (1, 1, False), (0, 0, False), (0, 1, False)],
)
def test_final_layer_norm(read, before, removed, exists):
  changes = {
    'do_layer_norm_before': bool(before),
    '_remove_final_layer_norm': bool(removed),
  }
  config = read(OPT_125M | changes)
  assert config.final_layer_norm == exists
  theirs = transformers.OPTModel(
    transformers.OPTConfig(
      **changes,
      hidden_size=8,
      num_hidden_layers=1,
      num_attention_heads=1,
      ffn_dim=8,
      vocab_size=8,
    )
  )
  assert (theirs.decoder.final_layer_norm is not None) == exists


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('model_type', 'llama'),
    ('model_type', None),
    ('activation_function', 'mish'),
    ('activation_function', ['relu']),
    ('activation_function', None),
    ('quantization_config', {'bits': 4}),
    ('scale_embeddings', True),
    ('learned_embeddings', False),
    ('is_encoder_decoder', True),
    ('rope_theta', 10000),
    ('num_key_value_heads', 4),
    ('anything', None),
    ('hidden_size', 0),
    ('hidden_size', '768'),
    ('hidden_size', 768.0),
    ('hidden_size', True),
    ('num_hidden_layers', None),
    ('word_embed_proj_dim', -1),
    ('enable_bias', 1),
    ('tie_word_embeddings', None),
    ('torch_dtype', 'float8_e4m3fn'),
    ('dtype', 'float64'),
    ('eos_token_id', [2, 3]),
    ('pad_token_id', -1),
    ('bos_token_id', 50272),
  ],
)
def test_refused_by_name(read, tmp_path, name, value):
  with pytest.raises(InputError) as e:
    read(OPT_125M | {name: value})
  assert name in str(e.value)
  assert str(tmp_path / 'config.json') in str(e.value)
  assert '\n' not in str(e.value)


def test_accepted_values(read):
  assert read(OPT_125M | {'eos_token_id': [2]}).eos_id == 2
  assert read(OPT_125M | {'quantization_config': None}) == read(OPT_125M)
  assert read(OPT_125M | {'word_embed_proj_dim': None}) == read(OPT_125M)
  changed = read(OPT_125M | {'dtype': 'bfloat16'})  # the newer name counts
  assert changed.checkpoint_dtype == 'bfloat16'


def test_heads_must_divide(read):
  with pytest.raises(InputError, match=r'config\.json: hidden_size 768 is'):
    read(OPT_125M | {'num_attention_heads': 11})


@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"a": ' * 50_000])
def test_malformed(read, text):
  with pytest.raises(InputError, match=r'config\.json'):
    read(text)


def test_missing_and_not_text(tmp_path):
  with pytest.raises(InputError, match=r'cannot read .*none'):
    read_config(tmp_path / 'none')
  (tmp_path / 'config.json').write_bytes(b'\xff\xfe\xfd')
  with pytest.raises(InputError, match='not JSON'):
    read_config(tmp_path / 'config.json')


def test_null_token_ids_mean_none(read):
  config = read(OPT_125M | {'eos_token_id': None, 'pad_token_id': None})
  assert (config.eos_id, config.pad_id) == (-1, 0)
