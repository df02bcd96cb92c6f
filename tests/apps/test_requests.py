"""Lines in, lines out; what is wrong with a line is in its answer."""

import json

import pytest

from flexjax.apps import requests
from flexjax.config import SamplingParams

GOOD = {
  'custom_id': 'a',
  'method': 'POST',
  'url': '/v1/completions',
  'body': {'model': 'opt', 'prompt': 'def ', 'max_tokens': 3},
}


def changed(**fields):
  return {**GOOD, **fields}


def body(**fields):
  return changed(body={**GOOD['body'], **fields})


def parse(fields, index=0):
  line = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
  return requests.parse(index, line, SamplingParams())


BROKEN = {
  'not JSON': (b'{"custom_id": "a", ', 'not JSON', None),
  'not UTF-8': (b'{"prompt": "\xff"}', 'not JSON', None),
  'no object': (b'[1, 2]', 'not a JSON object', None),
  'no custom_id': (
    changed(custom_id=None),
    'custom_id must be text',
    'custom_id',
  ),
  'method': (changed(method='GET'), "method must be 'POST'", 'method'),
  'url': (changed(url='/v1/chat/completions'), 'url must be', 'url'),
  'no body': (changed(body=None), 'body must be an object', 'body'),
  'an outer field': (changed(extra=1), "unknown field 'extra'", 'extra'),
  'no prompt': (changed(body={}), 'prompt must be', 'prompt'),
  'two prompts': (body(prompt=['a', 'b']), 'prompt must be one', 'prompt'),
  'max_tokens': (body(max_tokens=-1), 'max_tokens must be', 'max_tokens'),
  'max_tokens text': (body(max_tokens='9'), 'max_tokens must be', 'max_tokens'),
  'temperature': (body(temperature=-1), 'temperature must be', 'temperature'),
  'top_p': (body(top_p=1.5), 'top_p must be', 'top_p'),
  'n': (body(n=0), 'n must be an integer from 1', 'n'),
  'seed': (body(seed='x'), 'seed must be', 'seed'),
  'stop': (body(stop=[1]), 'stop must be', 'stop'),
  'logprobs': (body(logprobs=6), 'logprobs must be an integer', 'logprobs'),
  'echo': (body(echo='yes'), 'echo must be true or false', 'echo'),
  'unsupported': (
    body(presence_penalty=1),
    'not supported',
    'presence_penalty',
  ),
  'no number': (
    body(presence_penalty=False),
    'not supported',
    'presence_penalty',
  ),
  'no number either': (body(best_of=True), 'not supported', 'best_of'),
  'a surrogate': (body(**{'\ud800': 1}), 'not supported', '\ud800'),
  'unknown': (body(colour=1), "'colour' is not supported", 'colour'),
}


@pytest.mark.parametrize('case', BROKEN.values(), ids=BROKEN)
def test_a_broken_line_says_what_is_wrong(case):
  fields, why, field = case
  asked = parse(fields, 7)
  assert asked.error is not None
  assert why in asked.error[0]
  assert asked.error[1] == field
  line = json.loads(requests.refusal(asked))
  if asked.batch:
    assert line['custom_id'] == (fields.get('custom_id') if field else 'a')
    assert line['response']['status_code'] == 400
    assert why in line['response']['body']['error']['message']
    assert line['response']['body']['error']['param'] == field
    assert why in line['error']['message']
  else:
    assert line['index'] == 7
    assert why in line['error']


def test_a_line_that_cannot_be_told_is_like_the_others():
  for line in (b'{"custom_id": "a", ', b'17', b'[1]', b'\xff'):
    asked = requests.parse(3, line, SamplingParams(), like=True)
    answer = json.loads(requests.refusal(asked))
    assert answer['custom_id'] is None
    assert answer['response']['status_code'] == 400
  plain = requests.parse(3, b'{"prompt": 1}', SamplingParams(), like=True)
  assert not plain.batch


def test_a_whole_request():
  asked = parse(
    body(
      temperature=0.5,
      top_p=0.9,
      n=2,
      seed=4,
      stop='x',
      logprobs=3,
      echo=True,
      user='me',
      stream=False,
      presence_penalty=0,
      suffix=None,
    )
  )
  assert asked.error is None
  assert asked.batch
  assert asked.custom_id == 'a'
  assert asked.prompt == 'def '
  assert asked.params == SamplingParams(
    max_new_tokens=3, temperature=0.5, top_p=0.9, seed=4, stop=('x',)
  )
  assert (asked.n, asked.logprobs, asked.echo) == (2, 3, True)


def test_a_prompt_may_be_echoed_alone():
  asked = parse(body(max_tokens=0, echo=True, logprobs=0))
  assert asked.error is None
  assert asked.silent
  assert parse(body(max_tokens=0)).error is not None
  assert not parse(body(echo=True)).silent


def test_what_is_left_out_is_as_openai_has_it():
  fields = changed(body={'prompt': ['only one'], 'seed': None})
  asked = parse(fields, 9)
  assert asked.error is None
  assert asked.prompt == 'only one'
  # A seed of its own: what is drawn depends on no other request.
  assert asked.params == SamplingParams(
    max_new_tokens=16, temperature=1.0, seed=9
  )
  assert (asked.n, asked.logprobs, asked.echo) == (1, None, False)


def test_plain_lines():
  default = SamplingParams(max_new_tokens=5, temperature=0.1)
  line = b'{"prompt": [5, 6], "temperature": 0, "stop": ["x"]}'
  asked = requests.parse(3, line, default)
  assert asked.error is None
  assert not asked.batch
  assert asked.prompt == [5, 6]
  assert asked.params == SamplingParams(max_new_tokens=5, stop=('x',), seed=3)
  for text in (
    '{"prompt": "a", "body": 1}',
    '{"prompt": "a", "max_tokens": 1}',
  ):
    assert requests.parse(0, text.encode(), default).error
  named = requests.parse(0, b'{"prompt": 3, "custom_id": "q"}', default)
  assert json.loads(requests.refusal(named))['custom_id'] == 'q'
