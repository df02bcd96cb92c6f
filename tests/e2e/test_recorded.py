"""The recorded timeline of a run on the bundled model."""

import itertools
from collections import Counter

import numpy as np
import pytest

import flexjax
from flexjax import SamplingParams
from flexjax.hardware import LINKS
from flexjax.runtime.timeline import TRACKS

STEPS, BATCHES = 4, 3
PROMPTS = np.random.default_rng(0).integers(4, 4096, (6, 9)).tolist()
PARAMS = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
KINDS = ['embed', *['attention', 'mlp'] * 6, 'head']
TIERS = {'weights': (30, 30, 40), 'hidden': (0, 50, 50)}
POLICIES = {
  'three tiers': TIERS | {'cache': (30, 40, 30)},
  'packed': TIERS
  | {
    'cache': (30, 40, 30),
    'weight_bits': 4,
    'rounding': 'minmax',
    'cache_bits': 4,
  },
  'attention on host': TIERS | {'cache': (0, 100, 0), 'attention': 'host'},
  'row, no overlap': TIERS | {'schedule': 'row', 'overlap': False},
}


@pytest.fixture(scope='module', params=POLICIES.values(), ids=POLICIES)
def run(request, tmp_path_factory):
  """Tokens with and without recording, spans and figures."""
  with flexjax.load(
    dtype='float32',
    batch_size=2,
    num_batches=BATCHES,
    disk_dir=tmp_path_factory.mktemp('disk'),
    **request.param,
  ) as llm:
    plain = llm.generate(PROMPTS, PARAMS)
    assert llm.timeline() == []
    llm.record = True
    recorded = llm.generate(PROMPTS, PARAMS)
    spans, stats = llm.timeline(), llm.stats
    llm.record = False
    after = llm.generate(PROMPTS, PARAMS)
    assert llm.timeline() == []
  return (plain, recorded, after), spans, stats, request.param


def test_tokens_are_the_same(run):
  plain, recorded, after = run[0]
  assert plain == recorded == after


def test_every_cell_is_computed_once(run):
  spans = run[1]
  cells = itertools.product(range(STEPS), range(len(KINDS)), range(BATCHES))
  expected = {f'{KINDS[j]} {i}.{j}.{k}': (i, j, k) for i, j, k in cells}
  found = {
    s.name: (s.args['i'], s.args['j'], s.args['k'])
    for s in spans
    if s.track == 'device' and s.name.split()[0] in KINDS
  }
  assert found == expected
  names = Counter(s.name for s in spans if s.track == 'device')
  assert all(names[name] == 1 for name in expected)


def test_every_action_is_dispatched(run):
  dispatched = Counter(s.name for s in run[1] if s.track == 'dispatch')
  cells = STEPS * len(KINDS) * BATCHES
  assert dispatched['compute'] == cells
  assert dispatched['store_hidden'] == cells - STEPS * BATCHES
  assert dispatched['load_weights'] == dispatched['free_weights'] > 0


def test_bytes_add_up(run):
  _, spans, stats, _ = run
  total = dict.fromkeys(LINKS, 0)
  for span in spans:
    if span.track in LINKS:
      total[span.track] += span.args['bytes']
  assert total == stats.link_bytes
  assert all(total.values())


def test_tracks_are_busy_with_one_thing_at_a_time(run):
  for track in TRACKS:
    own = sorted((s.begin, s.end) for s in run[1] if s.track == track)
    assert all(begin <= end for begin, end in own)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(own)), track


def test_attention_on_the_cpu(run):
  _, spans, _, policy = run
  names = Counter(s.name.split()[0] for s in spans if s.track == 'cpu')
  decoded = (STEPS - 1) * 6 * BATCHES
  expected = {'attention': decoded} if 'attention' in policy else {}
  assert names == expected


def test_scoring_is_recorded(tmp_path):
  with flexjax.load(dtype='float32', batch_size=2, num_batches=1) as llm:
    plain = llm.score(PROMPTS[:2])
    llm.record = True
    assert llm.score(PROMPTS[:2]) == plain
    device = [s.name for s in llm.timeline() if s.track == 'device']
    assert device == [f'{kind} 0.{j}.0' for j, kind in enumerate(KINDS)]


def test_an_open_stream_does_not_end_the_next_one():
  with flexjax.load(dtype='float32', batch_size=1, num_batches=1) as llm:
    llm.record = True
    stream = llm.stream(PROMPTS[:2], PARAMS)
    next(stream)
    results = llm.stream(PROMPTS[:3], PARAMS)
    next(results)
    stream.close()
    list(results)
    computed = [s for s in llm.timeline() if s.track == 'device']
    assert len(computed) == 3 * STEPS * len(KINDS)


def test_failed_reads_are_still_raised(tmp_path):
  options = {'weights': (0, 0, 100), 'disk_dir': tmp_path}
  with flexjax.load(dtype='float32', batch_size=2, **options) as llm:
    llm.generate(PROMPTS[:2], PARAMS)
    for file in tmp_path.glob('weights.3/*/c/**/*'):
      if file.is_file():
        file.unlink()
    llm.record = True
    with pytest.raises(OSError, match=r'weights\.3'):
      llm.generate(PROMPTS[:2], PARAMS)
