"""What a request means: seeds, ends, limits, and what finished ones cost."""

import contextlib
import json
import shutil

import pytest
from conftest import greedy, logits_of

import flexjax
from flexjax import InputError, SamplingParams
from flexjax.runtime.session import Session
from flexjax.tiers import disk as disk_lib

DEVICE, HOST, DISK = (100, 0, 0), (0, 100, 0), (0, 0, 100)


@pytest.fixture
def shrinking(monkeypatch):
  """Batches shrink as soon as they can, whatever it costs."""
  monkeypatch.setattr(Session, '_is_worth', lambda *args: True)


def opened(c, **options):
  return flexjax.load(c.path, **{'dtype': 'float32', **options})


def tokens(outputs):
  return [output.token_ids for output in outputs]


def cut(ids, length):
  return [row[:n] for row, n in zip(ids, length, strict=True)]


# Seeds.

DRAWN = [
  {'temperature': 1.0},
  {'temperature': 0.7, 'top_k': 20},
  {'temperature': 1.3, 'top_p': 0.9},
  {'temperature': 0.0},
  {'temperature': 1.0, 'top_k': 40, 'top_p': 0.8},
]
ARRANGEMENTS = {
  'one at a time': {'batch_size': 1, 'num_batches': 1},
  'tiers': {
    'batch_size': 2,
    'num_batches': 2,
    'weights': DISK,
    'cache': (0, 50, 50),
    'hidden': HOST,
  },
  'row, attention on host': {
    'batch_size': 4,
    'num_batches': 2,
    'schedule': 'row',
    'attention': 'host',
  },
}


@pytest.fixture(scope='module')
def drawn(checkpoint):
  """Parameters of nine requests, and what they give all together."""
  c = checkpoint('125m')
  params = [
    SamplingParams(max_new_tokens=8, seed=n, ignore_eos=True, **DRAWN[n % 5])
    for n in range(9)
  ]
  with opened(c, batch_size=9) as llm:
    return params, tokens(llm.generate(c.prompts, params))


@pytest.mark.parametrize('how', ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_result_does_not_depend_on_the_rest(checkpoint, drawn, tmp_path, how):
  c = checkpoint('125m')
  params, expected = drawn
  with opened(c, disk_dir=tmp_path, **how) as llm:
    backwards = llm.generate(c.prompts[::-1], params[::-1])
    assert tokens(backwards)[::-1] == expected
    some = llm.generate(c.prompts[3:6], params[3:6])
    assert tokens(some) == expected[3:6]


def test_seeds(checkpoint):
  c = checkpoint('125m')
  hot = {'max_new_tokens': 8, 'temperature': 1.5, 'ignore_eos': True}
  prompt = c.prompts[3]
  seeds = [1, 2, 1, 2**32 - 1, 2**40]
  with opened(c, batch_size=5) as llm:
    params = [SamplingParams(seed=seed, **hot) for seed in seeds]
    first, second, third, *large = tokens(llm.generate([prompt] * 5, params))
    assert first == third != second
    assert first not in large
    # Without a seed, the index is the seed.
    indexed = tokens(llm.generate([prompt] * 5, SamplingParams(**hot)))
    assert indexed[1:3] == [first, second]
    assert len({tuple(row) for row in indexed}) > 3


def test_what_equals_greedy(checkpoint):
  c = checkpoint('125m')
  changes = [
    {'temperature': 1.0, 'top_k': 1},
    {'temperature': 1.0, 'top_p': 1e-6},
    {'temperature': 1e-4},
    {'temperature': 1e-40},
    {'temperature': 0.0, 'top_k': 5, 'top_p': 0.5, 'seed': 3},
  ]
  with opened(c, batch_size=5) as llm:
    params = [
      SamplingParams(max_new_tokens=8, ignore_eos=True, **change)
      for change in changes
    ]
    outputs = tokens(llm.generate([c.prompts[3]] * 5, params))
    assert outputs == [c.tokens[3][:8]] * 5


# Ends.


def test_eos(checkpoint, tmp_path):
  c = checkpoint('125m')
  shutil.copytree(c.path, tmp_path / 'model')
  config = tmp_path / 'model' / 'config.json'
  eos = c.tokens[0][3]
  assert eos not in c.tokens[0][:3]
  fields = json.loads(config.read_text())
  config.write_text(json.dumps(fields | {'eos_token_id': eos}))
  options = {'dtype': 'float32', 'batch_size': 3, 'num_batches': 2}
  with flexjax.load(tmp_path / 'model', **options) as llm:
    outputs = llm.generate(c.prompts, SamplingParams(max_new_tokens=9))
    assert outputs[0].finish_reason == 'eos'
    for output, ids in zip(outputs, c.tokens, strict=True):
      end = ids.index(eos) + 1 if eos in ids else 9
      assert output.token_ids == ids[:end]
      assert output.finish_reason == ('eos' if eos in ids else 'length')
      text = output.token_ids[: end - (eos in ids)]
      assert output.text == llm.tokenizer.decode(text)
    count = sum(len(output.token_ids) for output in outputs)
    assert llm.stats.generated_tokens == count
    ignoring = SamplingParams(max_new_tokens=9, ignore_eos=True)
    outputs = llm.generate(c.prompts, ignoring)
    assert tokens(outputs) == c.tokens
    assert {o.finish_reason for o in outputs} == {'length'}


@pytest.mark.parametrize('chunk', ['device', 'disk'])
def test_stop_strings_and_ids(checkpoint, tmp_path, chunk):
  c = checkpoint('125m')
  split = {'device': DEVICE, 'disk': DISK}[chunk]
  options = {'cache': split, 'batch_size': 2, 'num_batches': 3}
  with opened(c, disk_dir=tmp_path, **options) as llm:
    decode = llm.tokenizer.decode

    def expected(ids, stop, stop_ids):
      for n in range(1, len(ids) + 1):
        if ids[n - 1] in stop_ids:
          return ids[:n], decode(ids[: n - 1]), 'stop'
        text = decode(ids[:n])
        if found := [text.find(s) for s in stop if s in text]:
          return ids[:n], text[: min(found)], 'stop'
      return ids, decode(ids), 'length'

    params, wanted = [], []
    for n, ids in enumerate(c.tokens):
      text = decode(ids)
      stop = {0: (text[2:4], 'none'), 1: (text[-1:],), 2: ()}[n % 3]
      stop = tuple(s for s in stop if s)
      stop_ids = (ids[4],) if n % 3 == 2 else ()
      params.append(
        SamplingParams(
          max_new_tokens=9, ignore_eos=True, stop=stop, stop_token_ids=stop_ids
        )
      )
      wanted.append(expected(ids, stop, stop_ids))
    outputs = llm.generate(c.prompts, params)
    actual = [(o.token_ids, o.text, o.finish_reason) for o in outputs]
    assert actual == wanted
    assert sum(reason == 'stop' for _, _, reason in wanted) >= 6


# Limits.


def test_context_limit(checkpoint):
  """A context of 40: full ones are right, and short ones beside them."""
  c = checkpoint('125m')
  long = (c.prompts[8] * 3)[:35]
  params = [
    SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (5, 39, 1)
  ]
  prompts = [long, [7], [2, *long, 5, 6, 7]]
  with opened(c, batch_size=3) as llm:
    assert llm.config.max_positions == 40
    outputs = tokens(llm.generate(prompts, params))
    assert outputs[0] == (greedy(c.model, long, 5) or outputs[0])
    assert len(outputs[0]) == 5
    assert outputs[1] == (greedy(c.model, [7], 39) or outputs[1])
    assert len(outputs[1]) == 39
    assert outputs[2] == greedy(c.model, prompts[2], 1)
    [score] = llm.score([[*long, 5, 6, 7, 8, 9]])
    assert len(score.logprobs) == 40
    with pytest.raises(InputError, match=r'prompt 1 .*\b36\b.*\b40\b'):
      llm.generate([[5], [*long, 5]], SamplingParams(max_new_tokens=5))
    with pytest.raises(InputError, match=r'max_new_tokens.*\b40\b'):
      llm.generate([[5]], SamplingParams(max_new_tokens=40))
    # One more: the last token is not read.
    ids = [*long, 5, 6, 7, 8, 9, 10]
    [score] = llm.score([ids])
    expected = logits_of(c.model, ids[:-1]).log_softmax(-1)
    expected = expected[range(40), ids[1:]].numpy()
    assert score.logprobs[1:] == pytest.approx(expected, abs=2e-4)
    with pytest.raises(InputError, match=r'\b42\b.*\b41\b'):
      llm.score([[5] * 42])


def test_truncated_prompts(checkpoint):
  c = checkpoint('125m')
  text = [5 + n for n in range(50)]
  params = SamplingParams(max_new_tokens=6, truncate_prompt=True)
  plain = SamplingParams(max_new_tokens=6)
  with opened(c, batch_size=4) as llm:
    cutting = llm.generate([text, [2, *text], text[:34], [9]], params)
    whole = [text[-34:], [2, *text[-33:]], text[:34], [9]]
    assert tokens(cutting) == tokens(llm.generate(whole, plain))
    assert [o.prompt for o in cutting] == [text, [2, *text], text[:34], [9]]
    params = SamplingParams(max_new_tokens=40, truncate_prompt=True)
    with pytest.raises(InputError, match=r'\b40\b'):
      llm.generate([text], params)


# Costs.


def test_weights_are_read_once_per_step(checkpoint, tmp_path):
  c = checkpoint('125m')
  read = {}
  for schedule, batches in (('zigzag', 1), ('zigzag', 3), ('row', 3)):
    options = {'weights': DISK, 'cache': DEVICE, 'hidden': DEVICE}
    options |= {'schedule': schedule, 'num_batches': batches, 'batch_size': 3}
    with opened(c, disk_dir=tmp_path, **options) as llm:
      params = SamplingParams(max_new_tokens=4, ignore_eos=True)
      llm.generate(c.prompts[: 3 * batches], params)
      links = llm.stats.link_bytes
      read[schedule, batches] = links['disk_to_host']
      assert links['disk_to_host'] == links['host_to_device']
      assert links['device_to_host'] == links['host_to_disk'] == 0
      held = llm.stats.peak_bytes['disk']
  assert read['zigzag', 1] == read['zigzag', 3]
  # A tied table that head and next embed share is read once for both.
  assert 2.8 < read['row', 3] / read['zigzag', 1] <= 3
  assert 4 * held <= read['zigzag', 1] <= 4 * held * 1.5  # the table twice


def test_finished_requests_cost_nothing(checkpoint, tmp_path, shrinking):
  c = checkpoint('125m')
  options = {'batch_size': 2, 'num_batches': 4}
  options |= {'weights': DEVICE, 'cache': DISK, 'hidden': DEVICE}
  with opened(c, disk_dir=tmp_path, **options) as llm:

    def cost(stops):
      params = [
        SamplingParams(
          max_new_tokens=9, ignore_eos=True, stop_token_ids=stop, seed=0
        )
        for stop in stops
      ]
      outputs = llm.generate(c.prompts[:8], params)
      for output, ids in zip(outputs, c.tokens, strict=False):
        assert output.token_ids == ids[: len(output.token_ids)]
      return sum(llm.stats.link_bytes.values())

    whole = cost([()] * 8)
    early = cost([(), *((ids[0],) for ids in c.tokens[1:8])])
    none = cost([(ids[0],) for ids in c.tokens[:8]])
  # One row of eight decodes; all prefill rows are written.
  assert early < 0.35 * whole
  assert none < early


def test_weights_stop_when_all_have_ended(checkpoint, tmp_path):
  c = checkpoint('125m')
  options = {'batch_size': 3, 'num_batches': 3, 'weights': DISK}
  with opened(c, disk_dir=tmp_path, **options) as llm:
    llm.generate(c.prompts, SamplingParams(max_new_tokens=9, ignore_eos=True))
    whole = llm.stats.link_bytes['disk_to_host']
    params = [
      SamplingParams(max_new_tokens=9, stop_token_ids=(ids[0],))
      for ids in c.tokens
    ]
    outputs = llm.generate(c.prompts, params)
    assert tokens(outputs) == [ids[:1] for ids in c.tokens]
    # One step of nine, and what was on its way.
    assert llm.stats.link_bytes['disk_to_host'] < 2 / 9 * whole


CACHES = {
  'device': {'cache': DEVICE},
  'disk': {'cache': DISK},
  'disk, row, no overlap': {
    'cache': DISK,
    'schedule': 'row',
    'overlap': False,
  },
  'mixed, hidden on disk': {'cache': (30, 30, 40), 'hidden': DISK},
  'attention on host': {'attention': 'host'},
}


@pytest.mark.parametrize('change', CACHES.values(), ids=CACHES)
def test_batches_that_shrink(checkpoint, tmp_path, shrinking, change):
  """They give the same tokens, and so do the blocks that follow."""
  c = checkpoint('125m')
  options = {'batch_size': 4, 'num_batches': 1, **change}
  lengths = (9, 2, 1, 5, 1, 9, 3, 1, 9)
  params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in lengths]
  with opened(c, disk_dir=tmp_path, **options) as llm:
    outputs = llm.generate(c.prompts, params)
    assert tokens(outputs) == cut(c.tokens, lengths)
    assert llm.stats.generated_tokens == sum(lengths)


def test_shrinking_cache_of_several_chunks(
  checkpoint, tmp_path, shrinking, monkeypatch
):
  monkeypatch.setattr(disk_lib, 'DISK_CACHE_CHUNK', 2048)
  c = checkpoint('125m')
  params = [
    SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (9, 2, 1, 2)
  ]
  options = {'cache': DISK, 'batch_size': 4}
  with opened(c, disk_dir=tmp_path, **options) as llm:
    outputs = llm.generate(c.prompts[:4], params)
    assert tokens(outputs) == cut(c.tokens[:4], (9, 2, 1, 2))


# One LLM, many calls.

PLACES = {
  'default': {},
  'mixed': {'weights': (40, 30, 30), 'cache': DISK, 'hidden': (50, 0, 50)},
  'attention on host': {'attention': 'host', 'hidden': HOST},
}


@pytest.mark.parametrize('change', PLACES.values(), ids=PLACES)
def test_one_call_after_another(checkpoint, tmp_path, change):
  c = checkpoint('125m')

  def params(new):
    return SamplingParams(max_new_tokens=new, ignore_eos=True)

  with opened(c, disk_dir=tmp_path, batch_size=4, **change) as llm:
    calls = [(slice(1, 2), 1), (slice(0, 9), 9), (slice(2, 6), 7)]
    for part, new in calls:
      outputs = llm.generate(c.prompts[part], params(new))
      assert tokens(outputs) == [ids[:new] for ids in c.tokens[part]]
      scores = llm.score(c.prompts[part])
      for score, logprobs in zip(scores, c.logprobs[part], strict=True):
        assert score.logprobs[1:] == pytest.approx(logprobs, abs=2e-4)
    [score] = llm.score([[7]])
    assert score.logprobs == score.greedy == [None]


def test_stream_yields_block_by_block(checkpoint):
  c = checkpoint('125m')
  params = SamplingParams(max_new_tokens=3, ignore_eos=True)
  seen = []
  with opened(c, batch_size=2, num_batches=2) as llm:
    llm.on_progress = lambda what, done, total: seen.append((what, done, total))
    stream = llm.stream(c.prompts, params)
    for n, output in enumerate(stream):
      assert output.index == n
      done = max(d for what, d, _ in seen if what == 'generate')
      assert done == 3 * min(9, 4 * (n // 4 + 1))
    assert n == 8
    assert seen[-1] == ('generate', 27, 27)
    with contextlib.closing(llm.stream(c.prompts, params)) as stream:
      next(stream)  # and no more: the next call is not disturbed
    seen.clear()
    llm.score(c.prompts)
    total = sum(map(len, c.prompts))
    assert [what for what, _, _ in seen] == ['score'] * 3
    assert seen[-1] == ('score', total, total)
    outputs = llm.generate(c.prompts, params)
    assert tokens(outputs) == [ids[:3] for ids in c.tokens]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_is_the_same_everywhere(
  checkpoint, tmp_path, dtype, shrinking
):
  c = checkpoint('125m')
  params = [
    SamplingParams(max_new_tokens=8 if n % 3 else 2, ignore_eos=True)
    for n in range(len(c.prompts))
  ]
  results = []
  places = {'weights': DISK, 'cache': (0, 50, 50), 'hidden': DISK}
  on_host = {'attention': 'host', 'cache': HOST}
  for options in ({}, places, on_host):
    options = {'dtype': dtype, 'batch_size': 3, 'num_batches': 2, **options}
    with flexjax.load(c.path, disk_dir=tmp_path, **options) as llm:
      results.append(tokens(llm.generate(c.prompts, params)))
      [score] = llm.score(c.prompts[2:3])
      assert score.logprobs[1:] == pytest.approx(c.logprobs[2], abs=0.3)
  assert results[0] == results[1]
  # In a function of its own, which XLA rounds elsewhere.
  for prompt, near, far in zip(c.prompts, results[0], results[2], strict=True):
    same = [a == b for a, b in zip(near, far, strict=True)]
    if not all(same):
      n = same.index(False)
      logits = logits_of(c.model, prompt + near[:n])[-1]
      assert abs(logits[near[n]] - logits[far[n]]) < 0.1


def test_bundled_model():
  with flexjax.load(dtype='float32') as llm:
    params = SamplingParams(max_new_tokens=8)
    texts = ['import os\n', 'def f(']
    outputs = llm.generate(texts, params)
    for output, text in zip(outputs, texts, strict=True):
      assert output.prompt == text
      assert output.text
      assert output.finish_reason in ('length', 'eos')
      assert output.text == llm.tokenizer.decode(output.token_ids)
    ids = [llm.tokenizer.encode(text) for text in texts]
    assert [row[0] for row in ids] == [llm.config.bos_id] * 2
    assert tokens(llm.generate(ids, params)) == tokens(outputs)
    plain, scrambled = llm.score(['import sys\n', 'sys port\nim'])
    assert sum(plain.logprobs[1:]) > sum(scrambled.logprobs[1:])


# Refusals.

CALLS = {
  'no prompts': (lambda llm: llm.generate([]), 'no prompts'),
  'nothing to score': (lambda llm: llm.score([]), 'no prompts'),
  'one string': (lambda llm: llm.generate('abc'), 'list'),
  'one string to score': (lambda llm: llm.score('abc'), 'list'),
  'empty ids': (lambda llm: llm.generate([[5], []]), 'prompt 1 is empty'),
  'empty ids to score': (lambda llm: llm.score([[]]), 'empty'),
  'id too large': (lambda llm: llm.generate([[5], [120]]), 'prompt 1.*120'),
  'id below 0': (lambda llm: llm.generate([[-1]]), 'prompt 0.*-1'),
  'fraction': (lambda llm: llm.generate([[5.5]]), 'prompt 0'),
  'no prompt at all': (lambda llm: llm.generate([None]), 'prompt 0'),
  'too few parameters': (
    lambda llm: llm.generate([[5], [6]], [SamplingParams()]),
    '1.*2',
  ),
}


@pytest.mark.parametrize('case', CALLS.values(), ids=CALLS)
def test_calls_refused(checkpoint, case):
  call, message = case
  with (
    opened(checkpoint('125m')) as llm,
    pytest.raises(InputError, match=message),
  ):
    call(llm)


ARGUMENTS = {
  'split': ({'weights': (50, 20, 20)}, r'weights.*100.*90'),
  'pair': ({'cache': (50, 50)}, 'cache'),
  'dtype': ({'dtype': 'int4'}, 'int4'),
  'schedule': ({'schedule': 'spiral'}, 'spiral'),
  'depth': ({'prefetch_depth': 0}, 'prefetch_depth.*0'),
  'batch_size': ({'batch_size': 0}, 'batch_size.*0'),
  'num_batches': ({'num_batches': -1}, 'num_batches.*-1'),
  'memory': ({'device_memory': 'much'}, 'much'),
}


@pytest.mark.parametrize('case', ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_refused(checkpoint, case):
  changes, message = case
  with pytest.raises(InputError, match=message):
    opened(checkpoint('125m'), **changes)


def test_a_refused_call_leaves_the_model_usable(checkpoint):
  c = checkpoint('125m')
  params = SamplingParams(max_new_tokens=2, ignore_eos=True)
  with opened(c) as llm:
    for _ in range(2):
      outputs = llm.generate(c.prompts[:2], params)
      assert tokens(outputs) == [ids[:2] for ids in c.tokens[:2]]
      with pytest.raises(InputError):
        llm.generate([[5] * 60])
