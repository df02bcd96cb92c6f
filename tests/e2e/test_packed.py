"""Weights and cache in 8 and 4 bits: same results wherever they lie."""

import jax
import numpy as np
import pytest
from conftest import make_checkpoint, save_tokenizer
from safetensors.numpy import load_file, save_file

import flexjax
from flexjax import InputError, SamplingParams
from flexjax.config import UNPACKED, Packing
from flexjax.models import opt
from flexjax.models.checkpoint import Checkpoint
from flexjax.quant import groupwise
from flexjax.runtime import codec, formats
from flexjax.runtime.compute import Compute
from flexjax.runtime.formats import Format, PackedSource
from flexjax.runtime.profile import profile
from flexjax.runtime.session import Session
from flexjax.runtime.store import Store

DEVICE, HOST, DISK = (100, 0, 0), (0, 100, 0), (0, 0, 100)
MIXED = (30, 30, 40)
FOUR = Packing(4, 64)
SIZES = {
  'hidden_size': 128,
  'num_attention_heads': 2,
  'ffn_dim': 512,
  'vocab_size': 96,
  'word_embed_proj_dim': 128,
}
LENGTHS = (5, 1, 13, 8, 1, 9)
NEW = 7
BASE = {
  'dtype': 'float32',
  'batch_size': 3,
  'num_batches': 2,
  'weights': DEVICE,
  'cache': DEVICE,
  'hidden': DEVICE,
}


@pytest.fixture(scope='module', autouse=True)
def _small_chunks():
  """Packs fewer rows at once: small matrices are padded to a whole chunk."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(formats, '_CHUNK_ELEMENTS', 2**16)
    yield


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('packed')
  make_checkpoint(path, std=0.1, **SIZES)
  save_tokenizer(path)
  return path


@pytest.fixture(scope='module')
def prompts():
  rng = np.random.default_rng(3)
  return [rng.integers(3, 96, n).tolist() for n in LENGTHS]


def run(path, prompts, **options):
  """Greedy tokens, log-probabilities and the figures of generating."""
  params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
  with flexjax.load(path, **{**BASE, **options}) as llm:
    tokens = [o.token_ids for o in llm.generate(prompts, params)]
    stats = llm.stats
    return tokens, scores(llm, prompts), stats


def scores(llm, texts):
  return [np.array(s.logprobs[1:]) for s in llm.score(texts)]


def assert_close(actual, expected, atol):
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def furthest(actual, expected):
  pairs = zip(actual, expected, strict=True)
  return max(np.abs(a - b).max() for a, b in pairs if len(a))


# Placement.

BITS = {
  '4 and 4': {'weight_bits': 4, 'cache_bits': 4},
  '4 and 16': {'weight_bits': 4, 'cache_bits': 16},
  '16 and 4': {'weight_bits': 16, 'cache_bits': 4},
  '8 and 8, minmax': {
    'weight_bits': 8,
    'cache_bits': 8,
    'group_size': 32,
    'rounding': 'minmax',
  },
}
PLACES = {
  'weights on host': ('4 and 4', {'weights': HOST}),
  'all on host, row': (
    '4 and 4',
    {'weights': HOST, 'cache': HOST, 'hidden': HOST, 'schedule': 'row'},
  ),
  'all on disk, no overlap': (
    '4 and 4',
    {'weights': DISK, 'cache': DISK, 'hidden': DISK, 'overlap': False},
  ),
  'all mixed, deep': (
    '4 and 4',
    {'weights': MIXED, 'cache': MIXED, 'hidden': MIXED, 'prefetch_depth': 5},
  ),
  'all mixed, row, shallow': (
    '4 and 4',
    {
      'weights': MIXED,
      'cache': MIXED,
      'schedule': 'row',
      'prefetch_depth': 1,
    },
  ),
  '1 batch at a time': ('4 and 4', {'weights': HOST, 'num_batches': 1}),
  'attention on host': (
    '4 and 16',
    {'weights': HOST, 'cache': HOST, 'attention': 'host'},
  ),
  'attention on host, row': (
    '4 and 16',
    {'cache': HOST, 'attention': 'host', 'schedule': 'row'},
  ),
  'cache on disk, weights as they are': ('16 and 4', {'cache': DISK}),
  '8 bits, all mixed': (
    '8 and 8, minmax',
    {'weights': MIXED, 'cache': MIXED, 'hidden': MIXED},
  ),
}


@pytest.fixture(scope='module')
def on_device(model, prompts):
  """Returns a function: what bits give with everything on the device."""
  made = {}

  def get(bits):
    if bits not in made:
      made[bits] = run(model, prompts, **BITS[bits])
    return made[bits]

  return get


@pytest.mark.parametrize('place', PLACES.values(), ids=PLACES)
def test_placement_changes_nothing(model, prompts, on_device, tmp_path, place):
  bits, options = place
  tokens, logprobs, _ = on_device(bits)
  options = {**BITS[bits], **options, 'disk_dir': tmp_path}
  got, scored, _ = run(model, prompts, **options)
  assert got == tokens
  assert_close(scored, logprobs, 1e-4)


def test_expanded_weights_are_dropped_in_time(model, prompts):
  """As soon as the visit after theirs is done; nothing is left of them."""
  peaks = []
  for depth in (1, 2, 30):
    options = {'weights': HOST, 'prefetch_depth': depth, **BITS['4 and 4']}
    with flexjax.load(model, **{**BASE, **options}) as llm:
      params = SamplingParams(max_new_tokens=4, ignore_eos=True)
      llm.generate(prompts, params)
      plan = llm._loaded.plan
      peaks.append(llm.stats.peak_bytes['device'])
      device = llm._loaded.store.device
      assert device.nbytes == sum(device.sizes.values()) + plan.problem.kept
    assert peaks[-1] <= plan.peak['device']
  # One or two cells behind the current one are of the visit before it; on a
  # CPU nothing else is in flight.
  assert peaks[0] == peaks[1] < peaks[2]


def test_batches_that_shrink(model, prompts, on_device, monkeypatch, tmp_path):
  """Packed rows of those that go on are kept when others have ended."""
  monkeypatch.setattr(Session, '_is_worth', lambda *args: True)
  lengths = (NEW, 1, 3, NEW, 2, NEW)
  params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
  options = {**BASE, **BITS['4 and 4'], 'cache': DISK, 'disk_dir': tmp_path}
  with flexjax.load(model, **options) as llm:
    got = [o.token_ids for o in llm.generate(prompts, params)]
  tokens, *_ = on_device('4 and 4')
  assert got == [t[:n] for t, n in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize('bits', ['4 and 4', '16 and 4', '4 and 16'])
def test_caches_that_a_layer_takes_and_hands_back(
  model, prompts, on_device, monkeypatch, bits
):
  """As on an accelerator, where they are in its own memory."""
  calls = []
  in_place = Compute.attend_in_place

  def counted(self, *args):
    calls.append(args)
    return in_place(self, *args)

  monkeypatch.setattr(Compute, 'attend_in_place', counted)
  monkeypatch.setattr(
    Store, 'replaceable', lambda self, key: self.places[key] == 'device'
  )
  tokens, *_ = run(model, prompts, cache=(50, 50, 0), **BITS[bits])
  assert calls
  assert tokens == on_device(bits)[0]


def test_bits_change_the_results(model, prompts, on_device):
  """Else tests of them would show nothing. More bits come closer."""
  _, exact, stats = run(model, prompts)
  assert stats.to_json()['stored'] == {
    'dtype': 'float32',
    'weight_bits': 16,
    'cache_bits': 16,
  }
  far = {bits: furthest(on_device(bits)[1], exact) for bits in BITS}
  assert far['8 and 8, minmax'] > 1e-4
  for bits in BITS:
    assert bits.startswith('8') or far[bits] > 5 * far['8 and 8, minmax']
  stored = on_device('4 and 4')[2].to_json()['stored']
  assert stored['weight_bits'] == stored['cache_bits'] == 4
  assert stored['group_size'] == 64
  assert stored['rounding'] == 'search'
  stored = on_device('8 and 8, minmax')[2].to_json()['stored']
  assert stored['weight_bits'] == stored['cache_bits'] == 8
  assert stored['group_size'] == 32
  assert stored['rounding'] == 'minmax'


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_packed_cache_in_16_bits(model, prompts, dtype):
  """A CPU attends to it in float32, whatever was packed."""
  _, exact, _ = run(model, prompts, dtype=dtype)
  _, near, _ = run(model, prompts, dtype=dtype, cache_bits=8)
  assert_close(near, exact, 0.05)
  assert furthest(near, exact) > 0


REFUSED = {
  'host attention': ({'attention': 'host', 'cache_bits': 4}, 'cache_bits'),
  'host attention, 8': ({'attention': 'host', 'cache_bits': 8}, 'cache_bits'),
  'weight_bits': ({'weight_bits': 5}, r'weight_bits.*5'),
  'cache_bits': ({'cache_bits': 3}, r'cache_bits.*3'),
  'group_size': ({'group_size': 48}, r'group_size.*48'),
  'rounding': ({'rounding': 'x'}, r"rounding.*'x'"),
}


@pytest.mark.parametrize('case', REFUSED.values(), ids=REFUSED)
def test_refused(model, case):
  options, message = case
  with pytest.raises(InputError, match=message):
    flexjax.load(model, **options)


def test_sizes_that_cannot_be_divided(tmp_path):
  make_checkpoint(tmp_path, ffn_dim=130)
  with (
    pytest.raises(InputError, match=r'fc2.*130'),
    flexjax.load(tmp_path, dtype='float32', weight_bits=4) as llm,
  ):
    llm.score([[5, 6]])


# Bytes.


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
  """Matrices and cache beside which tables count for little."""
  path = tmp_path_factory.mktemp('deep')
  changes = {'num_hidden_layers': 4, 'vocab_size': 40}
  make_checkpoint(path, std=0.1, **{**SIZES, **changes})
  return path


def test_bytes_on_links_and_in_tiers(deep, tmp_path):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(3, 40, 32).tolist() for _ in range(32)]
  params = SamplingParams(max_new_tokens=5, ignore_eos=True)
  options = {**BASE, 'dtype': 'bfloat16', 'batch_size': 8, 'num_batches': 4}
  sizes = {}
  for bits in (16, 4):
    options |= {'weight_bits': bits, 'cache_bits': bits}
    for name, place in (('host', HOST), ('disk', DISK)):
      options |= {'weights': place, 'cache': place}
      disk_dir = tmp_path / str(bits)
      with flexjax.load(deep, **options, disk_dir=disk_dir) as llm:
        llm.generate(prompts, params)
        stats = llm.stats.to_json()
      sizes[bits, name] = stats['peak_bytes'][name]
      for link, count in stats['link_bytes'].items():
        sizes[bits, name, link] = count
    files = tmp_path / str(bits)
    sizes[bits, 'files'] = sum(
      p.stat().st_size
      for p in files.rglob('*')
      if MATRIX_NAMES & set(p.parts) and p.is_file()
    )

  def ratio(*what):
    return sizes[16, *what] / sizes[4, *what]

  assert sizes[4, 'disk', 'disk_to_host'] > 1e6
  assert ratio('host', 'host_to_device') >= 3.4
  assert ratio('disk', 'host_to_device') >= 3.4
  assert ratio('disk', 'disk_to_host') >= 3.4
  assert ratio('host', 'device_to_host') >= 3.4  # nothing but new rows
  assert ratio('disk', 'host_to_disk') >= 3.4
  assert ratio('host') >= 3.2  # where tables lie once, and count for more
  assert ratio('disk') >= 3.2
  # Matrices: 4 layers of (3 + 1) D D + 2 F D.
  matrices = 4 * (4 * 128 * 128 + 2 * 512 * 128)
  assert 2 * matrices <= sizes[16, 'files'] < 2.1 * matrices
  packed = 0.28125 * 2 * matrices
  assert packed <= sizes[4, 'files'] <= 0.285 * 2 * matrices + 4 * 4 * 1024


MATRIX_NAMES = {'qkv', 'out', 'fc1', 'fc2'}


# What the numbers are.


@pytest.fixture(scope='module')
def packed(model):
  """The weight groups as 4 bits hold them, expanded, and the keys' waves."""
  checkpoint = Checkpoint.open(model)
  config = checkpoint.config
  plain, form = Format('float32'), Format('float32', FOUR)
  exact = codec.Codec(config, 'float32', UNPACKED, UNPACKED)
  found = profile(checkpoint, plain.specs(config), config, exact)
  source = PackedSource(checkpoint, form, found.moments)
  groups = []
  for n, spec in enumerate(form.specs(config)):
    group = {name: np.zeros(s.shape, s.dtype) for name, s in spec.items()}
    for name, row, array in source.pieces(n, np.dtype('f4')):
      group[name][row : row + len(array)] = array
    for name in opt.MATRICES & group.keys():
      size = opt.weight_groups(config)[n][name][-1]
      group[name] = np.asarray(
        groupwise.expand(group[name], FOUR, size, 'float32')
      )
    groups.append(group)
  return groups, found.waves


def test_a_model_of_expanded_matrices(
  model, prompts, on_device, packed, tmp_path
):
  """16 bits of what 4 bits hold: the same model."""
  tensors = load_file(model / 'model.safetensors')
  for n in range(2):
    attention, mlp = packed[0][2 + 2 * n : 4 + 2 * n]
    q, k, v = np.split(attention['qkv'], 3)
    changed = {
      'self_attn.q_proj': q,
      'self_attn.k_proj': k,
      'self_attn.v_proj': v,
      'self_attn.out_proj': attention['out'],
      'fc1': mlp['fc1'],
      'fc2': mlp['fc2'],
    }
    for name, matrix in changed.items():
      name = f'model.decoder.layers.{n}.{name}.weight'
      assert np.abs(tensors[name] - matrix).max() > 1e-3
      tensors[name] = matrix.copy()
  (tmp_path / 'config.json').write_bytes((model / 'config.json').read_bytes())
  save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
  tokens, logprobs, _ = run(tmp_path, prompts)
  assert tokens == on_device('4 and 16')[0]
  assert_close(logprobs, on_device('4 and 16')[1], 1e-4)


class Naive:
  """A model in 4 bits: one text, one token at a time, no padding."""

  def __init__(self, path, groups, waves):
    config = Checkpoint.open(path).config
    self.layers = opt.layers(config, 'float32')
    self.groups, self.waves = groups, waves
    self.positions = config.max_positions
    rounding = codec.ROWS['search']
    self._pack = jax.jit(lambda x: groupwise.pack(x, FOUR, rounding))
    self._expand = jax.jit(lambda x: groupwise.expand(x, FOUR, 64, 'float32'))
    self._apply = jax.jit(
      lambda n, method, w, *args: self.layers[n].module.apply(
        {'params': w}, *args, method=method
      ),
      static_argnums=(0, 1),
    )

  def score(self, ids, own=True, exact=False):
    """Log-probabilities of all tokens but the first.

    Args:
      own: a token reads its own key and value as they are.
      exact: the cache is not packed.
    """
    cache = [[] for _ in self.layers]
    out = []
    for t, token in enumerate(ids[:-1]):
      x = np.array([[token]], np.int32)
      for n, layer in enumerate(self.layers):
        w = {}
        for group in layer.groups:
          w |= self.groups[group]
        if layer.kind == 'attention':
          q, rows = self._apply(n, 'project', w, x)
          new = {name: row[0, :, 0] for name, row in rows.items()}
          held = new if exact else self._held(new, n, t)
          seen = [*cache[n], new if own else held]
          cache[n].append(held)
          x = self._apply(n, 'output', w, x, attended(q[0, :, 0], seen))
        else:
          start, position = np.zeros(1, np.int32), np.int32(t)
          x, _ = self._apply(n, '__call__', w, x, None, start, position)
      logits = np.asarray(x[0], np.float64)
      top = logits.max()
      total = top + np.log(np.exp(logits - top).sum())
      out.append(logits[ids[t + 1]] - total)
    return np.array(out)

  def _held(self, new, layer, t):
    """Rows [N, H] as the cache holds them: keys without their waves."""
    waves = self.waves[(layer - 1) // 2]
    angles = np.pi * np.arange(waves.shape[-1]) * (t + 0.5) / self.positions
    wave = (waves * np.cos(angles)).sum(-1).astype('f4')
    k = self._expand(self._pack(new['k'] - wave)) + wave
    return {'k': k, 'v': self._expand(self._pack(new['v']))}


def attended(queries, seen):
  """Queries [N, H] over some {'k', 'v'} of [N, H] -> float32 [1, N, 1, H]."""
  queries = np.asarray(queries, np.float64)
  k, v = (np.stack([row[n] for row in seen], 1) for n in 'kv')  # [N, S, H]
  s = np.einsum('nsh,nh->ns', k, queries)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return np.einsum('ns,nsh->nh', p, v).astype('f4')[None, :, None]


def test_score_reads_what_the_cache_holds(model, prompts, on_device, packed):
  """Teacher forcing: as if tokens came one by one."""
  naive = Naive(model, *packed)
  some = (0, 2)
  texts = [prompts[n] for n in some]
  expected = [naive.score(ids) for ids in texts]
  actual = [on_device('4 and 4')[1][n] for n in some]
  assert_close(actual, expected, 1e-3)
  # An exact cache, or a token that reads itself as stored, would be noticed.
  for change in ({'exact': True}, {'own': False}):
    other = [naive.score(ids, **change) for ids in texts]
    assert furthest(other, expected) > 0.01, change


def test_generated_tokens_are_what_score_calls_greedy(
  model, prompts, on_device
):
  """A prompt of one token leaves all others to a packed cache."""
  outputs, *_ = on_device('4 and 4')
  whole = [p + o for p, o in zip(prompts, outputs, strict=True)]
  # Beside a long one, in the shapes that are compiled already.
  texts = [whole[1], whole[4], prompts[2]] * 2
  with flexjax.load(model, **BASE, **BITS['4 and 4']) as llm:
    one, other, *_ = llm.score(texts)
  assert one.greedy == other.greedy == [None] + [True] * NEW
