"""The model `flexjax` of lm-evaluation-harness (`pip install flexjax[eval]`).

Importing it registers the model. It hides how the harness's requests become
calls of an LLM: what is encoded, what is cut off on the left, which requests
share a call. The numbers are those of the harness's own model `hf`.
"""

import itertools
import logging
import math
import random
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models import utils as generation
from tqdm import tqdm

from flexjax.config import SamplingParams
from flexjax.errors import InputError
from flexjax.runtime.llm import load

_LOG = logging.getLogger(__name__)
_SHORTEST = 0.75  # of a call's longest prompt, once its blocks are full
_OWN = {
  'pretrained': str | None,
  'max_length': int | None,
  'add_bos_token': bool | None,
  'prefix_token_id': int | None,
}
_OPTIONS: dict[str, Any] = _OWN | {
  name: hint
  for name, hint in typing.get_type_hints(load).items()
  if name not in ('model', 'return')
}

# A request's key in the harness's cache, its context, what is scored after it.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model('flexjax')
class FlexjaxLM(TemplateLM):
  """A model for `lm_eval.simple_evaluate`.

  Args:
    batch_size: prompts per batch, at most, or 'auto': the planner's.
    max_batch_size: the same, for 'auto'.
    options: other arguments of `flexjax.load`, and
      pretrained: what `load` calls `model`.
      max_length: tokens that are read together; default the whole context.
      add_bos_token: whether texts get a leading token; default the tokenizer's.
      prefix_token_id: what stands before a text without context; default bos.

  Attributes:
    llm: the model; `llm.close()` deletes what it keeps on disk for the run.
    max_length: as it was given.

  Raises:
    InputError: an argument is not valid, or there is no model or tokenizer.
  """

  def __init__(
    self,
    *,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    **options: Any,
  ) -> None:
    super().__init__()
    values = {n: _checked(n, value) for n, value in options.items()}
    own = {n: values.pop(n, None) for n in _OWN}
    if batch_size is None or str(batch_size).startswith('auto'):
      batch_size = max_batch_size
    elif str(batch_size).isdecimal():  # the harness hands text over
      batch_size = int(str(batch_size))
    values['batch_size'] = _checked('batch_size', batch_size)
    self.llm = load(own['pretrained'], **values)
    self.llm.on_progress = _tell
    if (tokenizer := self.llm.tokenizer) is None:
      raise InputError('lm_eval needs a model with a tokenizer')
    self._tokenizer = tokenizer
    most = self.llm.config.max_positions
    self.max_length = most if own['max_length'] is None else own['max_length']
    if not 2 <= self.max_length <= most:
      raise InputError(
        f'max_length must be between 2 and {most}, got {self.max_length}'
      )
    named = (own['prefix_token_id'], tokenizer.bos_id, tokenizer.eos_id)
    ids = [n for n in (*named, self.llm.config.bos_id) if n is not None]
    self._prefix, self._leading = ids[0], tokenizer.encode('')
    if own['add_bos_token'] is not None:
      self._leading = self._leading or ids[:1] if own['add_bos_token'] else []

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: dict, additional_config: dict | None = None
  ) -> 'FlexjaxLM':
    """Opens a model; what `arg_dict` says wins over the harness's flags, of
    which the device is torch's."""
    flags = {'device': None} | (additional_config or {})
    del flags['device']
    return cls(**{n: v for n, v in flags.items() if v is not None} | arg_dict)

  @property
  def eot_token_id(self) -> int:
    return self.llm.config.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._prefix

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Refuses one by InputError: models of the OPT family have none."""
    if chat_template:
      raise InputError('flexjax has no chat templates')
    return None

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Returns a text's token ids; `add_special_tokens` says whether the leading
    one is put before them, None: unless the text spells it out itself."""
    ids = self._tokenizer.encode(string, leading=False)
    if add_special_tokens is None:
      add_special_tokens = ids[:1] != [self._prefix]
    return [*self._leading, *ids] if add_special_tokens else ids

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-likelihood of each text, in the harness's windows."""
    windows: list[Pair] = []
    ends = [0]
    for request in requests:
      cut = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self._prefix,
        max_seq_len=self.max_length,
        context_len=1,
      )
      windows += [(None, *utils.make_disjoint_window(pair)) for pair in cut]
      ends.append(len(windows))
    scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
    totals = [
      math.fsum(score for score, _ in scores[begin:end])
      for begin, end in itertools.pairwise(ends)
    ]
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def _loglikelihood_tokens(
    self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Returns each continuation's log-likelihood, and whether it is greedy;
    refuses one without tokens or with more than `max_length`."""
    most, room = self.max_length, self.max_length + 1  # the last is not read
    asked: dict[tuple[int, ...], list[int]] = {}  # ids to requests
    for n, (_, context, rest) in enumerate(requests):
      if not 0 < len(rest) < room:
        raise InputError(
          f'{len(rest)} tokens follow a context, not 1 to {most}'
        )
      ids = [*(context or [self._prefix]), *rest][-room:]
      asked.setdefault(tuple(ids), []).append(n)
    _warn_of_cuts(sum(len(c) + len(rest) > room for _, c, rest in requests))
    texts = sorted(asked, key=len, reverse=True)
    results = [(0.0, False)] * len(requests)
    with tqdm(total=len(requests), disable=disable_tqdm) as bar:
      for part in _calls([(0, len(ids)) for ids in texts], self.llm.block_size):
        for score in self.llm.score(texts[part]):
          for n in asked[texts[part.start + score.index]]:
            key, _, rest = requests[n]
            logprobs = score.logprobs[-len(rest) :]
            greedy = all(score.greedy[-len(rest) :])
            results[n] = math.fsum(p or 0.0 for p in logprobs), greedy
            if key is not None:
              self.cache_hook.add_partial('loglikelihood', key, results[n])
            bar.update()
    return results

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Continues each context up to one of its stop strings.

    A context that leaves too little room is cut on the left. Requests that
    sample have seeds drawn from Python's `random`, which the harness seeds.

    Raises:
      InputError: an argument of generation is unknown or out of range.
    """
    seed = random.getrandbits(31)
    params = [self._params(r.args[1], seed + n) for n, r in enumerate(requests)]
    prompts, sizes, cuts = [], [], 0
    for request, p in zip(requests, params, strict=True):
      ids = self.tok_encode(request.args[0]) or [self._prefix]
      prompts.append(ids[-(self.max_length - p.max_new_tokens) :])
      sizes.append((p.max_new_tokens, len(prompts[-1])))
      cuts += len(prompts[-1]) < len(ids)
    _warn_of_cuts(cuts)
    order = sorted(range(len(sizes)), key=lambda n: sizes[n], reverse=True)
    texts = [''] * len(sizes)
    with tqdm(total=len(requests), disable=disable_tqdm) as bar:
      for part in _calls([sizes[n] for n in order], self.llm.block_size):
        chosen = order[part]
        for out in self.llm.stream(
          [prompts[n] for n in chosen], [params[n] for n in chosen]
        ):
          n = chosen[out.index]
          texts[n] = generation.postprocess_generated_text(
            self._tokenizer.decode(out.token_ids), list(params[n].stop), None
          )
          self.cache_hook.add_partial(
            'generate_until', requests[n].args, texts[n]
          )
          bar.update()
    return texts

  def _params(self, arguments: dict[str, Any], seed: int) -> SamplingParams:
    """Reads a task's arguments of generation."""
    given: dict[str, Any] = {**generation.normalize_gen_kwargs(arguments)}
    new, samples = given.pop('max_gen_toks'), given.pop('do_sample')
    stop = tuple(text for text in given.pop('until') if text)
    drawn = {
      n: given.pop(n) for n in ('temperature', 'top_k', 'top_p') if n in given
    }
    for name, value in given.items():
      if (name, value) != ('num_beams', 1):
        raise InputError(f'generation: flexjax knows no {name}={value!r}')
    if samples and not drawn.get('temperature'):
      raise InputError('generation: do_sample needs a temperature above 0')
    if new >= self.max_length:
      raise InputError(
        f'generation: max_gen_toks {new} leaves no place for a prompt in '
        f'{self.max_length} tokens'
      )
    return SamplingParams(
      max_new_tokens=new, stop=stop, seed=seed, **drawn if samples else {}
    )


def _calls(
  sizes: Sequence[tuple[int, int]], block_size: Callable[[int, int], int]
) -> Iterator[slice]:
  """Cuts requests into calls of the LLM.

  A call pads to its longest prompt, and every such length is compiled for. So
  a call goes on until its blocks are full and prompts have become much
  shorter: few lengths, little padding, no rows without a request.

  Args:
    sizes: (new tokens, tokens of the prompt) of each request, descending.
    block_size: how many of (prompt_len, gen_len) run together.
  """
  begin = 0
  while begin < len(sizes):
    new, longest = sizes[begin]
    block = block_size(longest, new)
    end = begin + 1
    while end < len(sizes) and sizes[end][0] == new:
      shorter = sizes[end][1] < _SHORTEST * longest
      if shorter and (end - begin) % block == 0:
        break
      end += 1
    yield slice(begin, end)
    begin = end


def _checked(name: str, value: Any) -> Any:
  """Returns a model argument as `load` takes it; the harness makes numbers of
  what looks like one, and splits at commas: percentages may have slashes."""
  if name not in _OPTIONS:
    raise InputError(
      f"model_args: there is no '{name}'; there are {', '.join(_OPTIONS)}"
    )
  hint = _OPTIONS[name]
  if hint is Any:  # percentages
    return value.replace('/', ',') if isinstance(value, str) else value
  kinds = typing.get_args(hint) or (hint,)
  if type(value) in (int, float) and type(value) not in kinds:
    value = (float if float in kinds else str)(value)
  if type(value) not in kinds:
    names = ' or '.join(kind.__name__ for kind in kinds)
    raise InputError(f'model_args: {name} must be {names}, got {value!r}')
  return value


def _tell(what: str, done: int, total: int) -> None:
  if what == 'calibrate' and not done:
    _LOG.warning('measuring this machine, once, to plan by')


def _warn_of_cuts(count: int) -> None:
  if count:
    _LOG.warning('%d requests are too long and are cut on the left', count)
