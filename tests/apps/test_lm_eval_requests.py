"""What the harness's model `flexjax` makes of requests and arguments."""

import warnings

import pytest
import torch
import transformers

from flexjax.errors import InputError
from flexjax.runtime.sources import BUNDLED
from tests.lm_eval_tasks import CODE, close

with warnings.catch_warnings():
  warnings.simplefilter('ignore')
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

from flexjax.apps import lm_eval as adapter

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def pair():
  """Both models, opened once."""
  theirs = HFLM(
    pretrained=str(BUNDLED),
    dtype='float32',
    device='cpu',
    batch_size=2,
    # With it, requests of lm_eval 0.4.13 that have the same tokens but for the
    # last, and contexts of different lengths, get each other's numbers.
    logits_cache=False,
  )
  mine = adapter.FlexjaxLM(pretrained=str(BUNDLED), dtype='float32')
  yield mine, theirs
  mine.llm.close()


def request(kind, *arguments):
  return Instance(kind, {}, arguments, 0)


def test_contexts(pair):
  """Empty ones, spaces at the end, bos that is spelled out, too long ones."""
  asked = [
    ('', 'import sys'),
    ('', '</s>import'),
    ('import ', 'os'),
    ('  ', 'import'),
    ('</s>import', ' os'),
    ('', 'import sys'),
    (CODE, 'return'),
    ('x', CODE[:1500]),
    (CODE[:900], CODE[900:3300]),
  ]
  requests = [request('loglikelihood', *args) for args in asked]
  mine, theirs = (lm.loglikelihood(requests) for lm in pair)
  close([x for x, _ in mine], [x for x, _ in theirs])
  assert [g for _, g in mine] == [g for _, g in theirs]
  assert mine[0] == mine[5]


@pytest.mark.parametrize(
  'arguments',
  [
    {},
    {'until': 'x', 'max_gen_toks': 12},
    {'until': ['\n'], 'max_new_tokens': 7, 'temperature': 0.0, 'num_beams': 1},
    {'until': ['\n'], 'max_gen_toks': 1000},  # the prompt is cut
  ],
  ids=str,
)
def test_arguments_of_generation(pair, arguments):
  requests = [request('generate_until', CODE[:300], arguments)]
  mine, theirs = (lm.generate_until(requests) for lm in pair)
  assert mine == theirs


def test_samples(pair):
  """By the harness's seed; every repetition differs."""
  arguments = {'do_sample': True, 'temperature': 1.0, 'max_gen_toks': 16}
  requests = [request('generate_until', 'def ', arguments)] * 4
  drawn = []
  for seed in (1, 1, 2):
    adapter.random.seed(seed)
    drawn.append(pair[0].generate_until(requests))
  assert drawn[0] == drawn[1] != drawn[2]
  assert len(set(drawn[0])) == 4
  narrow = [
    request('generate_until', 'def ', arguments | {'top_p': 1e-6}),
    request('generate_until', 'def ', arguments | {'top_k': 1}),
    request('generate_until', 'def ', {'max_gen_toks': 16}),
  ]
  assert len(set(pair[0].generate_until(narrow))) == 1


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'num_beams': 4}, 'num_beams=4'),
    ({'repetition_penalty': 1.2}, 'repetition_penalty'),
    ({'do_sample': True}, 'temperature'),
    ({'max_gen_toks': 1024}, r'1024'),
    ({'max_gen_toks': 0}, 'max_new_tokens'),
    ({'do_sample': True, 'temperature': 1.0, 'top_p': 2.0}, 'top_p'),
  ],
)
def test_refused_arguments_of_generation(pair, arguments, message):
  with pytest.raises(InputError, match=message):
    pair[0].generate_until([request('generate_until', 'def ', arguments)])


def test_refused_continuations(pair):
  for rest in ('', 'x = 1\n' * 2000):
    with pytest.raises(InputError, match='1 to 1024'):
      pair[0].loglikelihood([request('loglikelihood', 'def', rest)])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'device': 'cuda'}, "no 'device'"),
    ({'peft': 'x'}, "no 'peft'; there are pretrained, .*batch_size"),
    ({'pretrained': '/nowhere'}, '/nowhere'),
    ({'batch_size': 'many'}, "batch_size .*'many'"),
    ({'batch_size': 0}, 'batch_size'),
    ({'batch_size': True}, 'batch_size'),
    ({'prefetch_depth': 'x'}, "prefetch_depth .*int.*'x'"),
    ({'overlap': 1}, 'overlap'),
    ({'max_length': 1}, '2 and 1024'),
    ({'max_length': 2048}, '2 and 1024'),
    ({'weights': '50/50'}, 'weights'),
    ({'random_weights': True, 'pretrained': 'opt-125m'}, 'tokenizer'),
  ],
  ids=str,
)
def test_refused_model_arguments(arguments, message):
  with pytest.raises(InputError, match=message):
    adapter.FlexjaxLM(**arguments)


def test_model_arguments():
  """What the harness reads from a command line, and its own flags."""
  create = adapter.FlexjaxLM.create_from_arg_obj
  flags = {'batch_size': 'auto', 'max_batch_size': 3, 'device': 'cuda:0'}
  lm = create({'weights': '0/100/0', 'device_memory': '1GiB'}, flags)
  assert lm.llm.block_size(8, 8) > 0
  lm.loglikelihood([request('loglikelihood', 'import', ' os')])
  assert lm.llm.plan.policy.weights.host == 100
  for given, size in (({}, 3), ({'batch_size': 2}, 2)):
    lm = create({'num_batches': 1, 'max_latency': 1000} | given, flags)
    assert lm.llm.block_size(8, 8) == size
  lm = adapter.FlexjaxLM.create_from_arg_string(
    'num_batches=1,cache=0/100/0', {'batch_size': '2'}
  )
  assert lm.llm.block_size(8, 8) == 2


def test_leading_tokens():
  plain, without, other = (
    adapter.FlexjaxLM(**arguments)
    for arguments in (
      {},
      {'add_bos_token': False},
      {'add_bos_token': True, 'prefix_token_id': 7},
    )
  )
  ids = without.tok_encode('import sys')
  assert ids[0] != 2
  assert plain.tok_encode('import sys') == [2, *ids]
  assert plain.tok_encode('</s>import sys') == [2, *ids]
  assert plain.tok_encode('import sys', add_special_tokens=False) == ids
  assert other.tok_encode('import sys') == [2, *ids]
  assert other.prefix_token_id == 7
  assert plain.prefix_token_id == plain.eot_token_id == 2
  theirs = transformers.AutoTokenizer.from_pretrained(BUNDLED)
  assert theirs('import sys')['input_ids'] == [2, *ids]


def test_calls():
  """Few lengths, whole blocks, one number of new tokens in each."""

  def cut(sizes, block):
    parts = list(adapter._calls(sizes, lambda prompt_len, gen_len: block))
    assert [n for p in parts for n in range(p.start, p.stop)] == list(
      range(len(sizes))
    )
    return [p.stop - p.start for p in parts]

  even = [(0, n) for n in (100, 90, 75, 74, 60, 50, 30)]
  assert cut(even, 1) == [3, 2, 1, 1]
  assert cut(even, 2) == [4, 2, 1]
  assert cut(even, 100) == [7]
  assert cut([(8, 20), (8, 19), (4, 20), (4, 5)], 1) == [2, 1, 1]
  assert cut([(8, 20), (8, 19), (4, 20), (4, 5)], 2) == [2, 2]
  assert cut([], 4) == []
  many = [(0, n) for n in range(2048, 0, -1)]
  lengths = cut(many, 1)
  assert len(lengths) < 30


def test_no_chat_template(pair):
  assert pair[0].chat_template(False) is None
  with pytest.raises(InputError, match='chat'):
    pair[0].chat_template(True)


def test_long_window_is_scored_whole(pair):
  """The context's last position predicts a token that is not read itself."""
  mine, theirs = pair
  ids = mine.tok_encode(CODE)[:1025]
  with torch.no_grad():
    logits = theirs.model(torch.tensor([ids[:-1]])).logits[0].double()
  expected = logits.log_softmax(-1)[range(1024), ids[1:]].tolist()
  [score] = mine.llm.score([ids])
  assert score.logprobs[1:] == pytest.approx(expected, abs=1e-3)
