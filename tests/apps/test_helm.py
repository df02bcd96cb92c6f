"""HELM's requests against `complete` and transformers, by HELM's own parts."""

import dataclasses
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers

import flexjax
from flexjax.apps.completions import Asked, complete
from flexjax.config import SamplingParams
from flexjax.runtime.sources import BUNDLED

# HELM and what it imports warn of much that is not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')
PROMPT = 'def add(a, b):'
OPTIONS = {'dtype': 'float32', 'batch_size': 4}


def test_without_helm():
  """One line says what to install."""
  program = (
    "import sys; sys.modules['helm'] = None\n"
    'try: import flexjax.apps.helm\n'
    'except ImportError as e: print(e)'
  )
  found = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert found.stdout == (
    "flexjax.apps.helm needs crfm-helm: pip install 'flexjax[helm]'\n"
  )


@pytest.fixture(scope='module')
def llm():
  with flexjax.load(**OPTIONS) as llm:
    yield llm


@pytest.fixture
def helm():
  """Names of HELM and of the client, once both can be imported."""
  pytest.importorskip('helm')
  from helm.common import cache, request

  from flexjax.apps import helm as ours

  return SimpleNamespace(
    ours=ours,
    Client=ours.FlexJaxClient,
    Request=request.Request,
    nowhere=cache.BlackHoleCacheConfig(),
    Sqlite=cache.SqliteCacheConfig,
  )


@pytest.fixture
def client(helm):
  return helm.Client(helm.nowhere, **OPTIONS)


@pytest.fixture
def ask(helm, client):
  """Returns a function that asks and gets completions, or else fails."""

  def ask(prompt=PROMPT, **fields):
    result = client.make_request(helm.Request(prompt=prompt, **fields))
    assert result.success, result.error
    assert result.request_time > 0
    for found in result.completions:
      assert found.logprob == pytest.approx(
        sum(t.logprob for t in found.tokens)
      )
      assert ''.join(t.text for t in found.tokens) == found.text
    return result.completions

  return ask


def logprobs_of(ids):
  """Returns float64 [T - 1]: of each token given those before it."""
  model = transformers.OPTForCausalLM.from_pretrained(
    BUNDLED, dtype=torch.float32
  )
  with torch.no_grad():
    rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
  return rows[range(len(ids) - 1), ids[1:]].tolist()


def test_greedy(ask, llm):
  [found] = ask(temperature=0, max_tokens=9)
  [expected] = llm.generate([PROMPT], SamplingParams(max_new_tokens=9))
  assert found.text == expected.text
  assert found.finish_reason == {'reason': 'length'}
  ids = llm.tokenizer.encode(PROMPT) + expected.token_ids
  assert [t.logprob for t in found.tokens] == pytest.approx(
    logprobs_of(ids)[-9:], abs=1e-4
  )


def test_stop_sequences(ask):
  [full] = ask(temperature=0, max_tokens=24)
  stop = full.text[9:12]
  [found] = ask(temperature=0, max_tokens=24, stop_sequences=['@@@', stop])
  assert found.text == full.text[: full.text.index(stop)]
  assert found.finish_reason == {'reason': 'stop'}


def test_end_of_text(ask, helm, monkeypatch):
  ask(temperature=0, max_tokens=1)
  key = json.dumps([None, OPTIONS], sort_keys=True)
  llm = helm.ours._OPEN[key]._llm
  ids = llm.generate([PROMPT], SamplingParams(max_new_tokens=4))[0].token_ids
  config = dataclasses.replace(llm.config, eos_id=ids[2])
  monkeypatch.setattr(llm, 'config', config)
  [found] = ask(temperature=0, max_tokens=4)
  assert found.finish_reason == {'reason': 'endoftext'}
  assert found.text == llm.tokenizer.decode(ids[:2])


def test_several_completions(ask):
  fields = {'temperature': 1.0, 'max_tokens': 12, 'num_completions': 3}
  texts = [found.text for found in ask(**fields)]
  assert len(set(texts)) == 3
  assert [found.text for found in ask(**fields)] == texts
  other = [found.text for found in ask(**fields, random='1')]
  assert not set(other) & set(texts)
  assert [found.text for found in ask(**fields, random='1')] == other


def test_sampling_is_narrowed(ask):
  """By top_p, and by top_k_per_token where it is not HELM's default of 1."""
  fields = {'temperature': 5.0, 'max_tokens': 12}
  [greedy] = ask(temperature=0, max_tokens=12)
  [wild] = ask(**fields, top_k_per_token=1)
  [narrow] = ask(**fields, top_p=1e-6)
  [few] = ask(**fields, top_k_per_token=2)
  assert wild.text != greedy.text
  assert narrow.text == greedy.text
  assert few.logprob > wild.logprob + 10


def test_prompt_alone(ask, llm):
  """Of a prompt that is echoed, HELM's tokens are all: no leading one."""
  [found] = ask(echo_prompt=True, max_tokens=0)
  ids = llm.tokenizer.encode(PROMPT)
  assert found.text == PROMPT
  assert [t.text for t in found.tokens] == llm.tokenizer.pieces(ids[1:])
  expected = logprobs_of(ids)
  assert [t.logprob for t in found.tokens] == pytest.approx(expected, abs=1e-4)


def test_leading_token_that_is_written_out(ask, llm):
  """It is not added again, and is not empty, which HELM would skip."""
  [bare] = ask(echo_prompt=True, max_tokens=0)
  [found] = ask('</s>' + PROMPT, echo_prompt=True, max_tokens=0)
  assert found.text == '</s>' + PROMPT
  assert [t.text for t in found.tokens] == [
    '</s>',
    *(t.text for t in bare.tokens),
  ]
  assert found.tokens[0].logprob == 0
  assert found.logprob == pytest.approx(bare.logprob, abs=1e-4)


def test_echo_goes_before_what_is_generated(ask):
  [tail] = ask(temperature=0, max_tokens=5)
  [prompt] = ask(echo_prompt=True, max_tokens=0)
  [found] = ask(temperature=0, max_tokens=5, echo_prompt=True)
  assert found.text == PROMPT + tail.text
  assert found.logprob == pytest.approx(prompt.logprob + tail.logprob, abs=1e-3)


def test_cache(helm, tmp_path, monkeypatch):
  client = helm.Client(helm.Sqlite(str(tmp_path / 'kept.sqlite')), **OPTIONS)
  request = helm.Request(prompt=PROMPT, max_tokens=4, temperature=0)
  first = client.make_request(request)
  assert (first.success, first.cached) == (True, False)

  def refuse(*args, **kwargs):
    raise AssertionError('asked again')

  monkeypatch.setattr(helm.ours, 'complete', refuse)
  again = helm.Client(helm.Sqlite(str(tmp_path / 'kept.sqlite')), **OPTIONS)
  second = again.make_request(request)
  assert second.cached
  assert second.completions == first.completions
  for fields in ({'random': '1'}, {'max_tokens': 5}, {'top_p': 0.5}):
    other = helm.Request(
      **{'prompt': PROMPT, 'max_tokens': 4, 'temperature': 0, **fields}
    )
    assert 'asked again' in client.make_request(other).error
  packed = helm.Client(
    helm.Sqlite(str(tmp_path / 'kept.sqlite')), **OPTIONS, cache_bits=4
  )
  assert 'asked again' in packed.make_request(request).error


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'prompt': 'x' * 9000}, r'^flexjax: prompt 0 has \d+ tokens'),
    ({'top_p': 0}, 'top_p must be'),
    ({'max_tokens': -1}, 'max_tokens must not be negative'),
    ({'num_completions': 0}, 'n must be an integer of at least 1'),
    ({'stop_sequences': ['']}, 'stop must be'),
    ({'frequency_penalty': 0.5}, 'does not take frequency_penalty'),
    (
      {'prompt': '', 'messages': [{'role': 'user', 'content': 'x'}]},
      'does not take messages',
    ),
  ],
)
def test_refused(helm, client, fields, message):
  result = client.make_request(helm.Request(**{'prompt': PROMPT, **fields}))
  assert not result.success
  assert result.completions == []
  assert result.error_flags.is_retriable is False
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(result.error)


def test_no_embeddings(helm, client):
  assert not client.make_request(helm.Request(embedding=True)).success


def test_what_cannot_be_opened(helm):
  client = helm.Client(helm.nowhere, '/does/not/exist', **OPTIONS)
  result = client.make_request(helm.Request(prompt=PROMPT))
  assert not result.success
  assert '/does/not/exist' in result.error
  assert result.error_flags.is_retriable is False
  with pytest.raises(flexjax.InputError, match="unknown option 'wieghts'"):
    helm.Client(helm.nowhere, wieghts=[0, 100, 0])


def test_threads_run_together(helm, client, llm, monkeypatch):
  """Each gets what is its own, and one bad prompt fails alone."""
  sizes = []

  def counted(llm, asked):
    sizes.append(len(asked))
    return complete(llm, asked)

  client.make_request(helm.Request(prompt=PROMPT, max_tokens=1))  # opens it
  monkeypatch.setattr(helm.ours, 'complete', counted)
  prompts = [f'x{n} = ' for n in range(8)]
  prompts[3] = 'x ' * 3000
  found = {}

  def work(prompt):
    request = helm.Request(prompt=prompt, temperature=0, max_tokens=6)
    found[prompt] = client.make_request(request)

  threads = [threading.Thread(target=work, args=(p,)) for p in prompts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert max(sizes) > 2
  good = [p for p in prompts if p != prompts[3]]
  params = SamplingParams(max_new_tokens=6)
  asked = [Asked(prompt=p, params=params) for p in good]
  for prompt, [expected] in zip(good, complete(llm, asked), strict=True):
    assert found[prompt].completions[0].text == expected.text
  assert 'prompt 0 has' in found[prompts[3]].error
