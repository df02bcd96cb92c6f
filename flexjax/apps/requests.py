"""Lines of a job's input to requests, and answers to lines of its output.

Two formats, told apart line by line: OpenAI's batch files (`custom_id`,
`method`, `url`, `body`), and plain objects with a `prompt` and any field of
`SamplingParams`. What is wrong with a line is said in that line's answer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexjax.apps.completions import MOST_LOGPROBS
from flexjax.config import SamplingParams
from flexjax.errors import InputError

URL = '/v1/completions'
MOST_CHOICES = 128
_OUTER = ('custom_id', 'method', 'url', 'body')
# Fields of a body that change nothing here, and the values that ask for that.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
  'model': lambda value: isinstance(value, str),
  'user': lambda value: isinstance(value, str),
  'stream': lambda value: value is False,
  'suffix': lambda value: value == '',
  'presence_penalty': lambda value: value == 0 and value is not False,
  'frequency_penalty': lambda value: value == 0 and value is not False,
  'logit_bias': lambda value: value == {},
  'best_of': lambda value: value == 1 and value is not True,
}
# Fields of SamplingParams by what OpenAI calls them, with its defaults.
_BODY = {
  'max_tokens': ('max_new_tokens', 16),
  'temperature': ('temperature', 1.0),
  'top_p': ('top_p', 1.0),
  'seed': ('seed', None),
  'stop': ('stop', ()),
}
_DEFAULT = SamplingParams()
_PLAIN = tuple(f.name for f in dataclasses.fields(SamplingParams))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """One line of the input.

  Attributes:
    index: its number among the lines that are not blank, from 0.
    custom_id: what the line calls itself; None where it does not.
    batch: it is one of OpenAI's batch format.
    prompt: text or token ids.
    n: completions of it.
    logprobs: alternatives per token whose log-probabilities are wanted; None
      for no log-probabilities at all.
    echo: the answer begins with the prompt.
    silent: no new tokens, only the prompt is echoed, with log-probabilities.
    error: why it cannot be answered, with the field that is at fault.
  """

  index: int
  custom_id: Any = None
  batch: bool = False
  prompt: str | list[int] = ''
  params: SamplingParams = _DEFAULT
  n: int = 1
  logprobs: int | None = None
  echo: bool = False
  silent: bool = False
  error: tuple[str, str | None] | None = None

  def refused(self, why: str, field: str | None = None) -> 'Asked':
    """Returns the same, as one that cannot be answered."""
    return dataclasses.replace(self, error=(why, field))


def parse(
  index: int, line: bytes, default: SamplingParams, like: bool = False
) -> Asked:
  """Reads a line; one that is not right has its `error` set.

  Args:
    default: of plain lines, for what they leave out.
    like: a line that cannot be told is one of OpenAI's.
  """
  name, batch = None, like
  try:
    fields = json.loads(line)
    if not isinstance(fields, dict):
      raise _Fault('not a JSON object', None)
    if isinstance(fields.get('custom_id'), str):
      name = fields['custom_id']
    batch = is_batch(fields)
    wanted = _openai(fields, index) if batch else _plain(fields, default, index)
    return Asked(index=index, custom_id=name, batch=batch, **wanted)
  except _Fault as fault:
    why, field = fault.args
  except InputError as e:  # of SamplingParams, which begins with the field
    why, field = str(e), str(e).split(' ', 1)[0]
  except (ValueError, RecursionError) as e:
    why, field = f'not JSON: {e}', None
  return Asked(index=index, custom_id=name, batch=batch, error=(why, field))


def is_batch(fields: Mapping[str, Any]) -> bool:
  """Whether a line is one of OpenAI's batch format."""
  return not fields.keys().isdisjoint(_OUTER[1:])


class _Fault(Exception):
  """(why, field) of a line that is not right."""


def _openai(fields: Mapping[str, Any], index: int) -> dict[str, Any]:
  """Returns what of `Asked` such a line says.

  Where it has no seed, its number is one: its place in a block is not.
  """
  name = fields.get('custom_id')
  if not isinstance(name, str) or not name:
    raise _Fault('custom_id must be text that is not empty', 'custom_id')
  for name in sorted(fields.keys() - set(_OUTER)):
    raise _Fault(f"unknown field '{name}'", name)
  for name, only in (('method', 'POST'), ('url', URL)):
    if fields.get(name) != only:
      given = json.dumps(fields.get(name))
      raise _Fault(f"{name} must be '{only}', got {given}", name)
  body = fields.get('body')
  if not isinstance(body, dict):
    raise _Fault('body must be an object', 'body')
  values: dict[str, Any] = {}
  for ours, default in _BODY.values():
    values[ours] = default
  more: dict[str, Any] = {'n': 1, 'logprobs': None, 'echo': False}
  for name, value in body.items():
    if name == 'prompt' or value is None:  # null is as good as left out
      continue
    if name in _BODY:
      values[_BODY[name][0]] = value
    elif name in more:
      more[name] = value
    elif name not in _NEUTRAL:
      raise _Fault(f"field '{name}' is not supported", name)
    elif not _NEUTRAL[name](value):
      given = json.dumps(value)
      raise _Fault(f'{name}={given} is not supported', name)
  _whole('n', more['n'], 1, MOST_CHOICES)
  if more['logprobs'] is not None:
    _whole('logprobs', more['logprobs'], 0, MOST_LOGPROBS)
  if not isinstance(more['echo'], bool):
    raise _Fault('echo must be true or false', 'echo')
  if silent := values['max_new_tokens'] == 0 and more['echo']:
    values['max_new_tokens'] = 1  # which keeps a place, no more
  if values['seed'] is None:
    values['seed'] = index
  stop = values['stop']
  values['stop'] = (stop,) if isinstance(stop, str) else stop
  try:
    params = SamplingParams(**values)
  except InputError as e:
    names = {ours: name for name, (ours, _) in _BODY.items()}
    ours, rest = str(e).split(' ', 1)
    raise _Fault(f'{names[ours]} {rest}', names[ours]) from None
  prompt = _prompt(body.get('prompt'))
  return {'prompt': prompt, 'params': params, 'silent': silent, **more}


def _plain(
  fields: Mapping[str, Any], default: SamplingParams, index: int
) -> dict[str, Any]:
  """Likewise."""
  values = {k: v for k, v in fields.items() if k not in ('prompt', 'custom_id')}
  for name in sorted(values.keys() - set(_PLAIN)):
    raise _Fault(
      f"unknown field '{name}'; there are prompt, custom_id, "
      f'{", ".join(_PLAIN)}',
      name,
    )
  if not isinstance(fields.get('custom_id', ''), str):
    raise _Fault('custom_id must be text', 'custom_id')
  prompt = _prompt(fields.get('prompt'))
  if values.get('seed', default.seed) is None:
    values['seed'] = index
  params = dataclasses.replace(default, **values)
  return {'prompt': prompt, 'params': params}


def _prompt(value: Any) -> str | list[int]:
  if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
    value = value[0]  # a list of one prompt
  if isinstance(value, str):
    return value
  if isinstance(value, list) and all(type(token) is int for token in value):
    return value
  raise _Fault('prompt must be one text or one list of token ids', 'prompt')


def _whole(name: str, value: Any, least: int, most: int) -> None:
  if type(value) is not int or not least <= value <= most:
    given = json.dumps(value)
    raise _Fault(
      f'{name} must be an integer from {least} to {most}, got {given}', name
    )


def line(asked: Asked, choices: Sequence[Any], model: str) -> str:
  """Returns the line of a request that was answered, or refused."""
  if asked.error:
    return refusal(asked)
  return answer(asked, choices, model)


def answer(asked: Asked, choices: Sequence[Any], model: str) -> str:
  """Returns the line that answers a request, by its choices.

  Args:
    choices: `completions.Choice`, as many as were asked for.
    model: its name.
  """
  if not asked.batch:
    (choice,) = choices
    fields: dict[str, Any] = {'index': asked.index}
    if asked.custom_id is not None:
      fields['custom_id'] = asked.custom_id
    fields |= {
      'prompt': asked.prompt,
      'text': choice.text,
      'token_ids': choice.token_ids,
      'finish_reason': choice.finish_reason,
    }
    return _dump(fields)
  made = sum(choice.completion_tokens for choice in choices)
  given = choices[0].prompt_tokens
  body = {
    'id': f'cmpl-{_number(asked)}',
    'object': 'text_completion',
    'model': model,
    'choices': [_choice(n, choice) for n, choice in enumerate(choices)],
    'usage': {
      'prompt_tokens': given,
      'completion_tokens': made,
      'total_tokens': given + made,
    },
  }
  return _line(asked, 200, body, None)


def _choice(n: int, choice: Any) -> dict[str, Any]:
  logprobs = None
  if choice.tokens is not None:
    logprobs = {
      'tokens': choice.tokens,
      'token_logprobs': choice.token_logprobs,
      'top_logprobs': choice.top_logprobs,
      'text_offset': choice.text_offset,
    }
  return {
    'index': n,
    'text': choice.text,
    'logprobs': logprobs,
    'finish_reason': choice.finish_reason,
  }


def refusal(asked: Asked) -> str:
  """Returns the line that says why a request is not answered."""
  assert asked.error is not None
  why, field = asked.error
  if not asked.batch:
    fields: dict[str, Any] = {'index': asked.index}
    if asked.custom_id is not None:
      fields['custom_id'] = asked.custom_id
    return _dump(fields | {'error': why})
  error = {
    'message': why,
    'type': 'invalid_request_error',
    'param': field,
    'code': 'invalid_request',
  }
  brief = {'code': 'invalid_request', 'message': why}
  return _line(asked, 400, {'error': error}, brief)


def _line(asked: Asked, status: int, body: Any, error: Any) -> str:
  number = _number(asked)
  fields = {
    'id': f'batch_req_{number}',
    'custom_id': asked.custom_id,
    'response': {
      'status_code': status,
      'request_id': f'req_{number}',
      'body': body,
    },
    'error': error,
  }
  return _dump(fields)


def _dump(fields: Mapping[str, Any]) -> str:
  """JSON as it reads best; what no encoding has, a lone surrogate, escaped."""
  text = json.dumps(fields, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:
    return json.dumps(fields)
  return text


def _number(asked: Asked) -> str:
  """Names a request, the same whenever it is answered."""
  what = json.dumps([asked.index, asked.custom_id])
  return hashlib.blake2b(what.encode(), digest_size=12).hexdigest()
