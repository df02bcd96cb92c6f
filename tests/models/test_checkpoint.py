"""Checkpoints against the models that wrote them."""

import json
import math
import shutil
import subprocess
import sys
import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from flexjax.config import ModelConfig
from flexjax.errors import InputError
from flexjax.models import checkpoint as checkpoint_lib
from flexjax.models import opt
from flexjax.models.checkpoint import Checkpoint
from flexjax.models.random_weights import RandomWeights

SMALL = {
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'ffn_dim': 48,
  'vocab_size': 70,
  'max_position_embeddings': 20,
}
MODELS = {
  'opt': {},
  '350m': {'word_embed_proj_dim': 16, 'do_layer_norm_before': False},
  'galactica': {'activation_function': 'gelu', 'vocab_size': 50},
  'no biases': {'enable_bias': False, 'layer_norm_elementwise_affine': False},
  'untied': {'tie_word_embeddings': False, '_remove_final_layer_norm': True},
}
FORMATS = ('safetensors', 'safetensors shards', 'bin', 'bin shards')


def make_model(**changes):
  """Returns a tiny float16 model with every weight drawn at random."""
  torch.manual_seed(0)
  config = transformers.OPTConfig(**{**SMALL, **changes})
  model = transformers.OPTForCausalLM(config).half()
  with torch.no_grad():
    for p in model.parameters():
      p.normal_(0, 0.1)
  return model


def save(model, path, kind='safetensors', prefix='model.decoder.'):
  """Writes a model in one of FORMATS."""
  path.mkdir(exist_ok=True)
  model.config.dtype = 'float16'
  model.config.save_pretrained(path)
  state = model.state_dict()
  if kind.startswith('safetensors') and model.config.tie_word_embeddings:
    del state['lm_head.weight']
  state = {n.replace('model.decoder.', prefix): t for n, t in state.items()}
  stem, end, write = {
    's': ('model', '.safetensors', save_file),
    'b': ('pytorch_model', '.bin', torch.save),
  }[kind[0]]
  if 'shards' not in kind:
    write(state, path / f'{stem}{end}')
    return path
  names = sorted(state)
  places = {}
  for n in range(3):
    shard = f'{stem}-{n + 1:05d}-of-00003{end}'
    part = {name: state[name] for name in names[n::3]}
    write(part, path / shard)
    places |= dict.fromkeys(part, shard)
  index = {'metadata': {'total_size': 1}, 'weight_map': places}
  (path / f'{stem}{end}.index.json').write_text(json.dumps(index))
  return path


def assemble(source, config, dtype):
  """Returns every group as whole tensors, checking how pieces line up."""
  out = []
  for group, shapes in enumerate(opt.weight_groups(config)):
    tensors = {n: [] for n in shapes}
    for name, row, array in source.pieces(group, dtype):
      assert row == sum(len(a) for a in tensors[name])
      assert array.dtype == np.dtype(dtype)
      assert array.flags.c_contiguous
      tensors[name].append(array)
    out.append({n: np.concatenate(a) for n, a in tensors.items()})
    assert {n: a.shape for n, a in out[-1].items()} == dict(shapes)
  return out


def expected_groups(model, dtype):
  """The same groups by hand, from the model's own state."""
  state = {
    n.removeprefix('model.decoder.'): t.float().numpy().astype(dtype)
    for n, t in model.state_dict().items()
  }
  c = model.config

  def pack(*names):
    found = [state[n] for n in names if n in state]
    return {'vectors': np.concatenate(found)} if found else {}

  groups = [{'table': state['embed_tokens.weight']}]
  groups.append({'positions': state['embed_positions.weight']})
  head = pack('final_layer_norm.weight', 'final_layer_norm.bias')
  if c.word_embed_proj_dim != c.hidden_size:
    groups[1]['project_in'] = state['project_in.weight']
    head['project_out'] = state['project_out.weight']
  if not c.tie_word_embeddings:
    head['table'] = state['lm_head.weight']
  for n in range(c.num_hidden_layers):
    p = f'layers.{n}.'
    a = p + 'self_attn.'
    qkv = [f'{a}{x}_proj' for x in 'qkv']
    norm = f'{p}self_attn_layer_norm'
    biases = [x + '.bias' for x in (*qkv, a + 'out_proj')]
    groups.append(
      {
        'qkv': np.concatenate([state[x + '.weight'] for x in qkv]),
        'out': state[a + 'out_proj.weight'],
        **pack(norm + '.weight', norm + '.bias', *biases),
      }
    )
    norm = f'{p}final_layer_norm'
    names = (norm + '.weight', norm + '.bias', p + 'fc1.bias', p + 'fc2.bias')
    weights = {x: state[f'{p}{x}.weight'] for x in ('fc1', 'fc2')}
    groups.append(weights | pack(*names))
  return [*groups, head]


def assert_same(actual, expected):
  assert [set(g) for g in actual] == [set(g) for g in expected]
  for ours, theirs in zip(actual, expected, strict=True):
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('changes', MODELS.values(), ids=MODELS)
def test_all_formats_hold_the_same_groups(tmp_path, changes, kind):
  model = make_model(**changes)
  source = Checkpoint.open(save(model, tmp_path, kind))
  actual = assemble(source, source.config, np.float16)
  assert_same(actual, expected_groups(model, np.float16))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_dtypes_are_converted_through_float32(tmp_path, dtype):
  model = make_model()
  source = Checkpoint.open(save(model, tmp_path))
  dtype = np.dtype(jnp.dtype(dtype))
  actual = assemble(source, source.config, dtype)
  assert_same(actual, expected_groups(model, dtype))


@pytest.mark.parametrize('prefix', ['decoder.', '', 'model.model.decoder.'])
def test_prefixes(tmp_path, prefix):
  model = make_model()
  source = Checkpoint.open(save(model, tmp_path, prefix=prefix))
  actual = assemble(source, source.config, np.float16)
  assert_same(actual, expected_groups(model, np.float16))


def test_saved_by_transformers(tmp_path):
  model = make_model()
  model.save_pretrained(tmp_path, max_shard_size='20KB')
  assert (tmp_path / 'model.safetensors.index.json').exists()
  source = Checkpoint.open(tmp_path)
  assert source.config.checkpoint_dtype == 'float16'
  actual = assemble(source, source.config, np.float16)
  assert_same(actual, expected_groups(model, np.float16))


def test_safetensors_are_preferred(tmp_path):
  save(make_model(), tmp_path, 'safetensors')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'not read')
  Checkpoint.open(tmp_path)


@pytest.mark.parametrize('limit', [1, 1000, 5000])
def test_pieces_are_bounded(tmp_path, monkeypatch, limit):
  monkeypatch.setattr(checkpoint_lib, '_PIECE_BYTES', limit)
  monkeypatch.setattr(checkpoint_lib, '_CAST_BYTES', limit // 3)
  model = make_model()
  source = Checkpoint.open(save(model, tmp_path))
  for group, shapes in enumerate(opt.weight_groups(source.config)):
    for name, _, array in source.pieces(group, np.float32):
      whole = name == 'vectors'
      assert whole or array.nbytes <= max(limit, 4 * shapes[name][1])
  actual = assemble(source, source.config, np.float32)
  assert_same(actual, expected_groups(model, np.float32))


def test_threads_may_read_together(tmp_path):
  model = make_model()
  source = Checkpoint.open(save(model, tmp_path, 'bin'))
  results = [None] * 8

  def read(n):
    results[n] = assemble(source, source.config, np.float16)

  threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  for result in results:
    assert_same(result, expected_groups(model, np.float16))


def test_too_large_for_float16(tmp_path):
  model = make_model().float()
  with torch.no_grad():
    model.model.decoder.layers[1].fc2.weight[3, 3] = 1e6
  for dtype in (torch.float32, torch.bfloat16):
    source = Checkpoint.open(save(model.to(dtype), tmp_path))
    with pytest.raises(InputError, match=r'1\.fc2\.weight.*too large'):
      assemble(source, source.config, np.float16)
    assemble(source, source.config, ml_dtypes.bfloat16)


def test_fingerprint(tmp_path):
  model = make_model()
  first = Checkpoint.open(save(model, tmp_path / 'a')).fingerprint
  assert Checkpoint.open(tmp_path / 'a').fingerprint == first
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')  # keeps times
  assert Checkpoint.open(tmp_path / 'b').fingerprint == first
  (tmp_path / 'b' / 'model.safetensors').touch()
  assert Checkpoint.open(tmp_path / 'b').fingerprint != first
  config = tmp_path / 'a' / 'config.json'
  config.write_text(config.read_text() + '\n')
  assert Checkpoint.open(tmp_path / 'a').fingerprint != first


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_dtype_that_config_does_not_say(tmp_path, dtype):
  save(make_model().to(getattr(torch, dtype)), tmp_path)
  config = tmp_path / 'config.json'
  fields = json.loads(config.read_text())
  del fields['dtype']
  config.write_text(json.dumps(fields))
  assert Checkpoint.open(tmp_path).config.checkpoint_dtype == dtype


@pytest.mark.parametrize('kind', FORMATS)
def test_truncated_file(tmp_path, kind):
  save(make_model(), tmp_path, kind)
  file = sorted(tmp_path.glob('*.safetensors' if kind[0] == 's' else '*.bin'))
  data = file[-1].read_bytes()
  for keep in (0, 5, 100, len(data) // 2, len(data) - 1):
    file[-1].write_bytes(data[:keep])
    with pytest.raises(InputError, match=file[-1].name):
      Checkpoint.open(tmp_path)


def test_file_that_shrinks_later(tmp_path):
  source = Checkpoint.open(save(make_model(), tmp_path))
  file = tmp_path / 'model.safetensors'
  pieces, others = (source.pieces(2, np.float16) for _ in range(2))
  next(pieces), next(others)
  file.write_bytes(file.read_bytes()[:10])
  with pytest.raises(InputError, match='truncated'):
    list(pieces)
  with pytest.raises(InputError, match='has changed since it was opened'):
    assemble(source, source.config, np.float16)
  file.unlink()
  with pytest.raises(InputError, match='cannot read'):
    list(others)
  with pytest.raises(InputError, match='has changed since it was opened'):
    assemble(source, source.config, np.float16)


@pytest.mark.parametrize('kind', ['safetensors shards', 'bin shards'])
def test_missing_shard(tmp_path, kind):
  save(make_model(), tmp_path, kind)
  file = next(tmp_path.glob('*00002*'))
  file.unlink()
  with pytest.raises(InputError, match=f'{file.name} is missing'):
    Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
  'places',
  [None, [], {'a': 3}, {'a': '../x.safetensors'}, {'a': '/etc/passwd'}],
)
def test_malformed_index(tmp_path, places):
  save(make_model(), tmp_path, 'safetensors shards')
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': places}))
  with pytest.raises(InputError, match='no weight_map'):
    Checkpoint.open(tmp_path)


def test_index_that_lists_too_much(tmp_path):
  save(make_model(), tmp_path, 'safetensors shards')
  index = tmp_path / 'model.safetensors.index.json'
  fields = json.loads(index.read_text())
  fields['weight_map']['more'] = 'model-00002-of-00003.safetensors'
  index.write_text(json.dumps(fields))
  with pytest.raises(InputError, match=r"00002-of-00003.*lacks tensor 'more'"):
    Checkpoint.open(tmp_path)


NAME = 'model.decoder.layers.1.fc1.weight'
TABLE = 'model.decoder.embed_tokens.weight'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda s: s.pop(NAME), r"no tensor 'layers\.1\.fc1\.weight'"),
    (lambda s: s.update({NAME: s[NAME].T}), r'shape \(32, 48\), .* \(48, 32\)'),
    (lambda s: s.update({NAME: s[NAME].int()}), 'stored as int32'),
    (lambda s: s.update({NAME[:-6] + 'x': s[NAME]}), r'fc1\.x.* no place'),
    (
      lambda s: s.update({NAME.replace('.1.', '.2.'): s[NAME]}),
      r'layers\.2\.fc1\.weight.* no place',
    ),
    (lambda s: s.update({'score.weight': s[NAME]}), 'score.* no place'),
    (lambda s: s.update({NAME[6:]: s[NAME]}), 'occurs again'),
    (lambda s: s.update({'lm_head.weight': s[TABLE] + 1}), 'differs from'),
    (lambda s: s.update({'lm_head.weight': s[TABLE][1:]}), 'differs from'),
  ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
  model = make_model()
  save(model, tmp_path)
  state = model.state_dict()
  del state['lm_head.weight']
  change(state)
  state = {n: t.contiguous().clone() for n, t in state.items()}
  save_file(state, tmp_path / 'model.safetensors')
  with pytest.raises(InputError, match=message):
    Checkpoint.open(tmp_path)


def test_harmless_extras(tmp_path):
  model = make_model()
  save(model, tmp_path)
  state = model.state_dict()
  state['lm_head.weight'] = state[TABLE].clone()
  state['model.decoder.version'] = torch.tensor([3.0])
  save_file(state, tmp_path / 'model.safetensors')
  Checkpoint.open(tmp_path)


def test_no_weights_and_no_directory(tmp_path):
  make_model().config.save_pretrained(tmp_path)
  with pytest.raises(InputError, match='holds no weights'):
    Checkpoint.open(tmp_path)
  with pytest.raises(InputError, match='not a directory'):
    Checkpoint.open(tmp_path / 'none')


def header(fields, data=b''):
  text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
  return len(text).to_bytes(8, 'little') + text + data


def entry(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'\xff' * 8,
    header(b'{'),
    header([]),
    header(b'[' * 100_000),
    header({'a': 3}),
    header({'a': {}}),
    header({'a': entry('F3')}, bytes(8)),
    header({'a': entry(shape=(-2,))}, bytes(8)),
    header({'a': entry(shape=(3,))}, bytes(8)),
    header({'a': entry(offsets=(0, 4))}, bytes(8)),
    header({'a': entry(offsets=(8, 16))}, bytes(8)),
    header({'a': entry()}, bytes(9)),
    header({'a': entry(shape=('2',))}, bytes(8)),
  ],
)
def test_malformed_safetensors(tmp_path, data):
  save(make_model(), tmp_path)
  (tmp_path / 'model.safetensors').write_bytes(data)
  with pytest.raises(InputError, match=r'model\.safetensors'):
    Checkpoint.open(tmp_path)


STREAM = """
import resource, sys
import jax.numpy as jnp
from flexjax.models import opt
from flexjax.models.checkpoint import Checkpoint
source = Checkpoint.open(sys.argv[1])
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0
for dtype in ('float16', 'bfloat16', 'float32'):
  for group in range(len(opt.weight_groups(source.config))):
    for piece in source.pieces(group, jnp.dtype(dtype)):
      total += piece.array.nbytes
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(total, 1024 * (peak - base))
"""


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_resident_memory_stays_bounded(tmp_path, kind):
  """A model of 270 MB, read three times, takes less than 100 MiB."""
  sizes = {'hidden_size': 512, 'ffn_dim': 65536, 'vocab_size': 9000}
  save(make_model(**sizes), tmp_path, kind)
  # A process of its own: what PyTorch frees here comes back late.
  command = [sys.executable, '-c', STREAM, str(tmp_path)]
  done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
  total, grown = map(int, done.stdout.split())
  assert total > 10**9
  assert grown < 100 * 2**20


CONFIG = ModelConfig(
  num_layers=2,
  num_heads=4,
  hidden_size=256,
  ffn_size=1024,
  embed_size=128,
  vocab_size=90000,
  tied_head=False,
)


def test_random_weights_are_what_they_say():
  whole = assemble(RandomWeights(CONFIG, 1), CONFIG, np.float32)
  seen = set()
  for group, shapes in zip(whole, opt.weight_groups(CONFIG), strict=True):
    for name, shape in shapes.items():
      array = group[name]
      if name == 'vectors':
        assert abs(array[:256].mean() - 1) < 0.01
        array = array[256:]
      assert abs(array.mean()) < 0.1 / math.sqrt(math.prod(shape))
      assert abs(array.std() / 0.02 - 1) < 0.1
      seen.add(array[:4].tobytes())
  assert len(seen) == sum(len(g) for g in whole)


def test_random_weights_depend_on_seed_and_place_only():
  source = RandomWeights(CONFIG, 1)
  whole = assemble(source, CONFIG, np.float32)
  assert_same(assemble(RandomWeights(CONFIG, 1), CONFIG, np.float32), whole)
  (first, *_) = source.pieces(4, np.float32)
  np.testing.assert_array_equal(first.array, whole[4]['qkv'])
  for dtype in (np.float16, ml_dtypes.bfloat16):
    cast = [{n: a.astype(dtype) for n, a in g.items()} for g in whole]
    assert_same(assemble(source, CONFIG, dtype), cast)
  other = assemble(RandomWeights(CONFIG, 2), CONFIG, np.float32)
  assert not np.array_equal(other[2]['out'], whole[2]['out'])
  assert RandomWeights(CONFIG, 2).fingerprint != source.fingerprint


def test_random_pieces_are_bounded():
  for group in range(len(opt.weight_groups(CONFIG))):
    for piece in RandomWeights(CONFIG, 1).pieces(group, np.float32):
      assert piece.array.nbytes <= 64 * 2**20
