"""Prompts, however they are given, to token ids that a model can take."""

from collections.abc import Sequence

import numpy as np

from flexjax.config import ModelConfig, SamplingParams
from flexjax.data.tokenizer import Tokenizer
from flexjax.errors import InputError

Prompt = str | Sequence[int]


def refuse_string(prompts: Sequence[Prompt]) -> None:
  """Raises InputError where one string is given for a list of prompts."""
  if isinstance(prompts, str):
    raise InputError('prompts must be a list of prompts, not one string')


def params_of(
  prompts: Sequence[Prompt],
  params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[SamplingParams]:
  """Returns the parameters of each prompt, where one may stand for all.

  Raises:
    InputError: there are not as many as prompts, or they are none.
  """
  refuse_string(prompts)
  if params is None or isinstance(params, SamplingParams):
    return [params or SamplingParams()] * len(prompts)
  for one in params:
    if not isinstance(one, SamplingParams):
      raise InputError(f'sampling parameters are SamplingParams, not {one!r}')
  if len(params) != len(prompts):
    raise InputError(
      f'{len(params)} sampling parameters for {len(prompts)} prompts'
    )
  return list(params)


class Encoder:
  """Encodes and checks prompts for one model.

  Args:
    tokenizer: None for a model that takes token ids only.
    name: of the model, for errors.
  """

  def __init__(
    self, config: ModelConfig, tokenizer: Tokenizer | None, name: str
  ):
    self.config, self.tokenizer, self.name = config, tokenizer, name

  def encode(
    self,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    room: int | Sequence[int] | None = None,
  ) -> list[list[int]]:
    """See `LLM.encode`."""
    if len(prompts) == 0:
      raise InputError('there are no prompts')
    if room is None:
      room = [p.max_new_tokens for p in params]
    elif isinstance(room, int):
      room = [room] * len(prompts)
    each = zip(prompts, params, room, strict=True)
    return [
      self._fitted(n, self._ids(n, prompt), p, new)
      for n, (prompt, p, new) in enumerate(each)
    ]

  def _fitted(
    self, n: int, ids: list[int], params: SamplingParams, new: int
  ) -> list[int]:
    """Returns as much of a prompt as its place holds, if it may be cut."""
    limit = self.config.max_positions - new
    if limit < 1:
      raise InputError(
        f'prompt {n}: max_new_tokens {new} leaves no place for a prompt in a '
        f'context of {self.config.max_positions}'
      )
    if len(ids) > limit and params.truncate_prompt:
      lead = ids[: ids[0] == self.config.bos_id]
      ids = lead + ids[len(ids) - limit + len(lead) :]
    if len(ids) > limit and new < 1:
      raise InputError(
        f'text {n} has {len(ids)} tokens; at most {limit} can be scored'
      )
    if len(ids) > limit:
      raise InputError(
        f'prompt {n} has {len(ids)} tokens; with {new} new ones the context '
        f'of {self.config.max_positions} holds {limit}: shorten it, ask for '
        'fewer new tokens, or set truncate_prompt'
      )
    return ids

  def _ids(self, n: int, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
      if self.tokenizer is None:
        raise InputError(
          f'prompt {n} is text, but {self.name} has no tokenizer: give lists '
          'of token ids'
        )
      try:
        ids = self.tokenizer.encode(prompt)
      except InputError as e:
        raise InputError(f'prompt {n}: {e}') from None
    elif isinstance(prompt, list | tuple | np.ndarray) and all(
      issubclass(kind, int | np.integer) for kind in set(map(type, prompt))
    ):
      ids = list(map(int, prompt))
    else:
      raise InputError(f'prompt {n} must be text or a list of token ids')
    if not ids:
      raise InputError(f'prompt {n} is empty')
    size = self.config.vocab_size
    for token in (min(ids), max(ids)):
      if not 0 <= token < size:
        raise InputError(
          f'prompt {n}: token id {token} is outside the vocabulary of {size}'
        )
    return ids
