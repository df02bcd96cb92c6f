"""A client of HELM (crfm-helm) that completes prompts with flexjax.

Named in HELM's `model_deployments.yaml` as flexjax.apps.helm.FlexJaxClient;
docs/helm.md has an example. Hides that requests which HELM's threads make one
by one run together, as batches of one model that all clients share.
"""

import atexit
import hashlib
import inspect
import json
import threading
import time
from concurrent.futures import Future
from typing import Any

import flexjax
from flexjax.apps.completions import Asked, Choice, complete
from flexjax.config import SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.llm import LLM

try:
  from helm.clients.client import CachingClient
  from helm.common.cache import CacheConfig
  from helm.common.request import (
    EMBEDDING_UNAVAILABLE_REQUEST_RESULT,
    ErrorFlags,
    GeneratedOutput,
    Request,
    RequestResult,
    Token,
    wrap_request_time,
  )
except ModuleNotFoundError as e:
  if e.name is None or e.name.partition('.')[0] != 'helm':
    raise
  raise ModuleNotFoundError(
    "flexjax.apps.helm needs crfm-helm: pip install 'flexjax[helm]'",
    name='helm',
  ) from None

# Options of `flexjax.load` by which numbers differ, not only where they live.
_NUMERIC = (
  'dtype',
  'weight_bits',
  'cache_bits',
  'group_size',
  'rounding',
  'random_weights',
  'weights_seed',
  'allow_lossy',
)
_GATHER_SECONDS = 0.05  # little beside a run, enough for threads to come back


class FlexJaxClient(CachingClient):
  """Answers HELM's requests for text, each token with its log-probability.

  The model is opened at the first request and stays until the process ends;
  clients of equal arguments share it.

  Args:
    cache_config: where HELM keeps responses; it gives this by itself.
    pretrained_model_name_or_path: a checkpoint directory, a converted folder
      or a hub id; None for the bundled model.
    options: of `flexjax.load`, by the same names.

  Raises:
    InputError: there is no such option.
  """

  def __init__(
    self,
    cache_config: CacheConfig,
    pretrained_model_name_or_path: str | None = None,
    **options: Any,
  ):
    super().__init__(cache_config=cache_config)
    known = set(inspect.signature(flexjax.load).parameters) - {'model'}
    if unknown := sorted(set(options) - known):
      raise InputError(
        f"unknown option '{unknown[0]}' of FlexJaxClient; there are "
        f'{", ".join(sorted(known))}'
      )
    self._model, self._options = pretrained_model_name_or_path, options

  def make_request(self, request: Request) -> RequestResult:
    """Completes a prompt; what goes wrong comes back as the result's error.

    An error that the request itself is to blame for is marked as one that
    trying again does not mend.
    """
    if request.embedding:
      return EMBEDDING_UNAVAILABLE_REQUEST_RESULT
    try:
      _check(request)
      raw = self._raw(request)
      response, cached = self.cache.get(
        CachingClient.make_cache_key(raw, request),
        wrap_request_time(lambda: self._serve(request)),
      )
    except InputError as e:
      return _failed(str(e), ErrorFlags(is_retriable=False))
    except Exception as e:  # HELM decides whether to go on, not we.
      return _failed(f'{type(e).__name__}: {e}', None)
    return RequestResult(
      success=True,
      cached=cached,
      request_time=response['request_time'],
      request_datetime=response['request_datetime'],
      completions=[_output(**found) for found in response['completions']],
      embedding=[],
    )

  def _raw(self, request: Request) -> dict[str, Any]:
    """Returns all that the response depends on but `request.random`, JSON."""
    return {
      'engine': 'flexjax',
      'model': self._model,
      'options': {n: self._options[n] for n in _NUMERIC if n in self._options},
      'prompt': request.prompt,
      'temperature': request.temperature,
      'num_completions': request.num_completions,
      'max_tokens': request.max_tokens,
      'top_k_per_token': request.top_k_per_token,
      'top_p': request.top_p,
      'stop_sequences': request.stop_sequences,
      'echo_prompt': request.echo_prompt,
    }

  def _serve(self, request: Request) -> dict[str, Any]:
    """Returns a response that HELM's cache can keep."""
    model = _shared(self._model, self._options)
    ids, added = model.encode(request.prompt)
    choices = model.ask(
      Asked(
        prompt=ids,
        params=_params(request),
        n=request.num_completions,
        logprobs=0,
        echo=request.echo_prompt,
      )
    )
    return {'completions': [model.listed(c, request, added) for c in choices]}


class _Model:
  """A model that threads share: what waits while it runs is run together."""

  def __init__(self, llm: LLM):
    if llm.tokenizer is None:
      raise InputError('HELM asks in text: the model has no tokenizer')
    self._llm, self._tokenizer = llm, llm.tokenizer
    self._lock, self._running = threading.Lock(), threading.Lock()
    self._waiting: list[tuple[Asked, Future]] = []

  def encode(self, prompt: str) -> tuple[list[int], int]:
    """Returns a prompt's ids, and how many of these lead it unwritten.

    HELM writes the leading token out where it counts tokens, and takes for
    granted that it is not added a second time.
    """
    leading = self._tokenizer.encode('')
    ids = self._tokenizer.encode(prompt, leading=False)
    if ids[: len(leading)] == leading:
      return ids, 0
    return leading + ids, len(leading)

  def ask(self, asked: Asked) -> list[Choice]:
    """Returns the choices of one request, run with those of other threads."""
    mine: Future = Future()
    with self._lock:
      self._waiting.append((asked, mine))
    with self._running:
      if not mine.done():
        time.sleep(_GATHER_SECONDS)
        with self._lock:
          group, self._waiting = self._waiting, []
        self._run(group)
    return mine.result()

  def _run(self, group: list[tuple[Asked, Future]]) -> None:
    try:
      found = complete(self._llm, [asked for asked, _ in group])
    except BaseException as e:
      if len(group) > 1 and isinstance(e, Exception):
        for one in group:  # Nobody is to fail by another's prompt.
          self._run([one])
      else:
        for _, future in group:
          future.set_exception(e)
      return
    for (_, future), choices in zip(group, found, strict=True):
      future.set_result(choices)

  def listed(
    self, choice: Choice, request: Request, added: int
  ) -> dict[str, Any]:
    """Returns what HELM wants to know of a choice, as plain JSON.

    Args:
      added: how many of the prompt's ids lead it unwritten. They are left
        out: HELM finds its own tokens by counting.
    """
    assert choice.tokens is not None
    assert choice.token_logprobs is not None
    tokens, text = list(choice.tokens), choice.text
    logprobs = [x or 0.0 for x in choice.token_logprobs]
    if request.echo_prompt:
      tokens, logprobs = tokens[added:], logprobs[added:]
      first = self._tokenizer.spell(choice.token_ids[added])
      # HELM skips a first token that is empty, as a special one here is.
      if not tokens[0] and request.prompt.startswith(first):
        tokens[0], text = first, first + text
    reason = choice.finish_reason
    ended = choice.completion_tokens and choice.token_ids[-1]
    if reason == 'stop' and ended == self._llm.config.eos_id:
      reason = 'endoftext'
    return {
      'text': text,
      'tokens': tokens,
      'logprobs': logprobs,
      'reason': reason,
    }


_OPEN: dict[str, _Model] = {}
_OPENING = threading.Lock()


def _shared(model: str | None, options: dict[str, Any]) -> _Model:
  """Returns the one model of these arguments; opens it if need be."""
  key = json.dumps([model, options], sort_keys=True, default=str)
  with _OPENING:
    if key not in _OPEN:
      llm = flexjax.load(model, **options)
      _OPEN[key] = _Model(llm)
      atexit.register(llm.close)
    return _OPEN[key]


def _check(request: Request) -> None:
  """Raises InputError for what no language model of ours can do."""
  for name in (
    'messages',
    'multimodal_prompt',
    'image_generation_parameters',
    'response_format',
    'presence_penalty',
    'frequency_penalty',
  ):
    if getattr(request, name):
      raise InputError(f'FlexJaxClient does not take {name}')
  if (most := request.max_tokens) < 0:
    raise InputError(f'max_tokens must not be negative, got {most}')


def _params(request: Request) -> SamplingParams | None:
  """Returns how to continue the prompt; None for not at all."""
  if not request.max_tokens:
    return None
  # Prompts draw by streams of their own; `random` names another stream.
  drawn = json.dumps([request.prompt, request.random]).encode()
  seed = int.from_bytes(hashlib.sha256(drawn).digest()[:4])
  # 1 is what HELM's adapters leave it at, also where they want to sample.
  k = request.top_k_per_token
  return SamplingParams(
    max_new_tokens=request.max_tokens,
    temperature=request.temperature,
    top_k=0 if k == 1 else k,
    top_p=request.top_p,
    seed=seed,
    stop=tuple(request.stop_sequences),
  )


def _output(
  text: str, tokens: list[str], logprobs: list[float], reason: str
) -> GeneratedOutput:
  return GeneratedOutput(
    text=text,
    logprob=sum(logprobs),
    tokens=[
      Token(text=t, logprob=x) for t, x in zip(tokens, logprobs, strict=True)
    ],
    finish_reason={'reason': reason},
  )


def _failed(error: str, flags: Any) -> RequestResult:
  return RequestResult(
    success=False,
    cached=False,
    completions=[],
    embedding=[],
    error=f'flexjax: {error}',
    error_flags=flags,
  )
