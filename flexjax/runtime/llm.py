"""`load` and `LLM`: a model in its tiers, ready for prompts.

The one place that knows the order of things: plan for the work at hand,
refuse what cannot fit, fill the tiers, then run block after block. Weights
are read at the first use, when the work is known, and stay.
"""

import dataclasses
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from flexjax.config import (
  Policy,
  SamplingParams,
  Split,
  Workload,
  parse_bits,
  parse_bytes,
)
from flexjax.data.blocks import blocks
from flexjax.errors import InputError
from flexjax.hardware import read as read_hardware
from flexjax.policy import search
from flexjax.policy.plan import Plan
from flexjax.runtime import devices, sources
from flexjax.runtime.generate import Output, Request
from flexjax.runtime.loaded import LoadedModel, OnProgress
from flexjax.runtime.prompts import Encoder, Prompt, params_of, refuse_string
from flexjax.runtime.scores import Score
from flexjax.runtime.session import Session
from flexjax.runtime.stats import Stats
from flexjax.runtime.timeline import Span

_COLUMNS = 8  # prompt lengths are rounded up to it, to compile less often


def load(
  model: str | Path | None = None,
  *,
  dtype: str = 'auto',
  weights: Any = None,
  cache: Any = None,
  hidden: Any = None,
  batch_size: int | None = None,
  num_batches: int | None = None,
  schedule: str = 'zigzag',
  prefetch_depth: int = 2,
  overlap: bool = True,
  attention: str | None = None,
  weight_bits: int | str | None = None,
  cache_bits: int | str | None = None,
  group_size: int | None = None,
  rounding: str | None = None,
  device_memory: int | str | None = None,
  host_memory: int | str | None = None,
  disk_dir: str | Path | None = None,
  random_weights: bool = False,
  weights_seed: int = 0,
  allow_lossy: bool = False,
  max_latency: float | None = None,
  hardware: str | Path | None = None,
) -> 'LLM':
  """Opens a model; its weights are read when it is first used.

  Args:
    model: a checkpoint directory, a converted folder or a hub id; None for the
      bundled model.
    dtype: 'float32', 'bfloat16', 'float16' or 'auto': the checkpoint's on an
      accelerator, on a CPU the fastest that fits.
    weights, cache, hidden: percentages on device, host and disk, such as
      (20, 80, 0); None leaves each to the planner.
    batch_size: prompts per batch, at most; None likewise.
    num_batches: batches per block, at most; None likewise.
    schedule, prefetch_depth, overlap: see `config.Policy`.
    attention: likewise; None leaves it to the planner.
    weight_bits, cache_bits: likewise; 'auto' is as if not given.
    group_size, rounding: likewise.
    device_memory, host_memory: budgets in bytes or like '16GiB'; default what
      the machine has.
    disk_dir: directory of the disk tier; without one there is no disk tier.
    random_weights: draw the weights from `weights_seed`, for benchmarks.
    allow_lossy: the planner may store weights and cache whose bits are not
      given in 4 bits.
    max_latency: seconds that a block may be predicted to take.
    hardware: record of this machine, JSON; default the one that `flexjax
      calibrate` keeps, or else one that is measured quickly and kept.

  Raises:
    InputError: an argument is out of range, or there is no such model.
  """
  sources.check_dtype(dtype)
  policy = Policy(
    weights=Split.parse(weights, 'weights'),
    cache=Split.parse(cache, 'cache'),
    hidden=Split.parse(hidden, 'hidden'),
    schedule=schedule,
    prefetch_depth=prefetch_depth,
    overlap=overlap,
    attention=attention,
    weight_bits=parse_bits(weight_bits, 'weight_bits'),
    cache_bits=parse_bits(cache_bits, 'cache_bits'),
    group_size=group_size,
    rounding=rounding,
  )
  for name, value in (('batch_size', batch_size), ('num_batches', num_batches)):
    if value is not None and value < 1:
      raise InputError(f'{name} must be at least 1, got {value}')
  if max_latency is not None and not 0 < max_latency < math.inf:
    raise InputError(
      f'max_latency must be a positive number, got {max_latency}'
    )
  budgets = {
    'device': parse_bytes(device_memory, 'device_memory'),
    'host': parse_bytes(host_memory, 'host_memory'),
  }
  source = sources.find_source(
    model, random_weights=random_weights, seed=weights_seed
  )
  devices.limit(budgets['device'], budgets['host'])
  loaded = LoadedModel(
    source,
    policy,
    dtype=dtype,
    budgets=budgets,
    disk_dir=Path(disk_dir) if disk_dir else None,
    record=read_hardware(hardware) if hardware else None,
    allow_lossy=allow_lossy,
  )
  return LLM(loaded, batch_size, num_batches, max_latency)


class LLM:
  """A model that generates and scores. Use it as a context manager, or call
  `close`, to delete what it keeps on disk for the run.

  Attributes:
    config: the model's configuration.
    tokenizer: None for a preset with random weights.
    batch_size: prompts per batch, at most; None where the planner says.
    stats: figures of the latest `generate`, `stream` or `score`.
    on_progress: called as on_progress(what, done, total) while work goes on;
      `what` is 'calibrate' (steps of measuring this machine), 'profile'
      (layers, before packing), 'load' (weight groups), 'generate' or 'score'
      (tokens).
    record: whether `generate`, `stream` and `score` record a timeline.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    batch_size: int | None = None,
    num_batches: int | None = None,
    max_latency: float | None = None,
  ):
    self._loaded, self._session = loaded, Session(loaded)
    self._max_latency = max_latency
    self.batch_size, self._num_batches = batch_size, num_batches
    self.config = loaded.source.config
    self.tokenizer = loaded.source.tokenizer
    self._encoder = Encoder(self.config, self.tokenizer, self.name)
    self.on_progress: OnProgress = lambda what, done, total: None
    self.record = False
    self._settled: tuple[int, int] | None = None

  @property
  def stats(self) -> Stats:
    return self._session.stats()

  @property
  def name(self) -> str:
    """The model's, as it was given."""
    return self._loaded.source.name

  @property
  def fingerprint(self) -> str:
    """Tells apart models, and versions of one."""
    return self._loaded.source.weights.fingerprint

  @property
  def plan(self) -> Plan:
    """What the latest run ran by: its policy, its block, its places."""
    return self._loaded.plan

  def timeline(self) -> list[Span]:
    """Returns what the latest run did and when, for `timeline.write`.

    Empty unless `record` was set before that run and it has ended.
    """
    return self._session.spans

  def settle(self, batch_size: int, num_batches: int) -> None:
    """Makes all later blocks this large, whether or not they are full: for
    callers with many blocks, who compile for each size."""
    self._settled = batch_size, num_batches

  def generate(
    self,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    least: tuple[int, int] = (0, 0),
  ) -> list[Output]:
    """Continues every prompt; returns the outputs in the prompts' order.

    Args:
      prompts: texts, or lists of token ids.
      params: one for all, or one for each; default `SamplingParams()`.
      least: columns for prompts and for new tokens that blocks have at least:
        few different ones are few compilations.

    Raises:
      InputError: a prompt or parameter is not valid, or nothing fits.
    """
    return list(self.stream(prompts, params, least=least))

  def stream(
    self,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    least: tuple[int, int] = (0, 0),
  ) -> Generator[Output, None, None]:
    """Like `generate`, but yields each block's outputs when it is done.

    Everything is checked, planned and loaded before this returns. A model
    runs one stream at a time: another call ends those still open.
    """
    each = params_of(prompts, params)
    ids = self.encode(prompts, each)
    requests = self._requests(each)
    work = self._prepare(ids, requests, least)
    return self._stream(prompts, ids, requests, work)

  def _requests(self, params: Sequence[SamplingParams]) -> list[Request]:
    return [
      Request(n, p, self.config.eos_id, self._decode)
      for n, p in enumerate(params)
    ]

  def _stream(
    self, prompts, ids, requests, work
  ) -> Generator[Output, None, None]:
    total = sum(r.params.max_new_tokens for r in requests)
    done = 0

    def on_token(tokens: int, ended: int) -> None:
      nonlocal done
      done += tokens
      self.on_progress('generate', done, total)

    with self._session.measured(self.record):
      for block in self._blocks(ids, work):
        self._session.run(block, requests, work, on_token)
        for n in sorted(block.index[block.index >= 0].tolist()):
          r = requests[n]
          given = prompts[n]
          yield Output(
            n,
            given if isinstance(given, str) else [int(t) for t in given],
            r.text or '',
            r.ids,
            r.reason,
          )
      self.on_progress('generate', total, total)

  def score(self, texts: Sequence[Prompt], top: int = 0) -> list[Score]:
    """Returns the log-probability of every token of every text, and whether
    it is the likeliest one.

    A text may have one token more than the context: nothing follows its last.

    Args:
      texts: texts, or lists of token ids.
      top: how many of the likeliest tokens to name in each token's place.

    Raises:
      InputError: a text is not valid or longer than that, or `top` is out of
        range.
    """
    refuse_string(texts)
    size = self.config.vocab_size
    if not (isinstance(top, int) and 0 <= top <= size):
      raise InputError(f'top must be between 0 and {size}, got {top!r}')
    each = [SamplingParams(max_new_tokens=1)] * len(texts)
    ids = self.encode(texts, each, room=-1)
    work = self._prepare(ids, [])
    total = sum(map(len, ids))
    done = 0
    scores = []
    with self._session.measured(self.record):
      for block in self._blocks(ids, work):
        for k, found in self._session.score(block, work, top):
          for row, n in enumerate(block.index[k].tolist()):
            if n >= 0:
              tail = slice(block.start[k, row], -1)
              mine = [x[row, tail].tolist() for x in found]
              scores.append(Score.of(n, ids[n], *mine))
              done += len(ids[n])
        self.on_progress('score', done, total)
    return scores

  def encode(
    self,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    room: int | Sequence[int] | None = None,
  ) -> list[list[int]]:
    """Turns prompts into token ids and checks that each has its place.

    `room` is how many positions to leave, one number for all or one for each;
    default each one's new tokens. -1 takes in a last token that is not read.

    Raises:
      InputError: names the first prompt that is not valid, and why.
    """
    return self._encoder.encode(prompts, params, room)

  def warm_up(
    self,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
  ) -> None:
    """Loads and compiles for such prompts: two tokens of the first block."""
    each = params_of(prompts, params)
    ids = self.encode(prompts, each)
    work = self._prepare(ids, self._requests(each))
    short = [
      dataclasses.replace(p, max_new_tokens=min(2, p.max_new_tokens))
      for p in each
    ]
    requests = self._requests(short)
    with self._session.measured():
      block = next(self._blocks(ids, work))
      self._session.run(block, requests, work, lambda tokens, ended: None)

  def block(
    self,
    prompt_len: int,
    gen_len: int,
    prompts: int | None = None,
    *,
    within: float = 1.0,
  ) -> tuple[int, int]:
    """Returns the batch size, and the number of batches, that the planner would
    take together, of so many prompts or as many as one likes.

    Args:
      within: of blocks of a half, a quarter, ... of that, the smallest one that
        keeps such a part of the throughput.
    """

    def choose(prompts):
      request = self._request(prompt_len, gen_len, prompts)
      return self._loaded.choose(request, self.on_progress)

    if (self.batch_size, self._num_batches) != (None, None):
      within = 1.0  # what is given is kept
    best = found = choose(prompts)
    least = within * best.prediction.throughput_tokens_per_s
    while within < 1:
      work = found.plan.problem.work
      rows = work.batch_size * work.num_batches
      smaller = choose(rows // 2) if rows > 1 else None
      if smaller is None or smaller.prediction.throughput_tokens_per_s < least:
        break
      found = smaller
    work = found.plan.problem.work
    return work.batch_size, work.num_batches

  def rate(
    self, prompt_len: int, gen_len: int, batch_size: int, num_batches: int
  ) -> float:
    """Returns the tokens per second that such blocks are predicted to give; 0
    where they do not fit."""
    request = search.Request(
      prompt_len=prompt_len,
      gen_len=gen_len,
      batch_size=batch_size,
      num_batches=num_batches,
    )
    try:
      choice = self._loaded.choose(request, self.on_progress)
    except InputError:
      return 0.0
    return choice.prediction.throughput_tokens_per_s

  def block_size(self, prompt_len: int, gen_len: int) -> int:
    """Returns how many prompts these are."""
    return math.prod(self.block(prompt_len, gen_len))

  def close(self) -> None:
    """Frees the tiers and deletes the run's files; a later use loads again."""
    self._loaded.close()

  def __enter__(self) -> 'LLM':
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def _decode(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(ids) if self.tokenizer else ''

  def _prepare(
    self,
    ids: list[list[int]],
    requests: Sequence[Request],
    least: tuple[int, int] = (0, 0),
  ) -> Workload:
    """Plans and loads for prompts to generate from, or to score."""
    longest = max(*map(len, ids), least[0])
    gen_len = max((r.params.max_new_tokens for r in requests), default=0)
    gen_len = max(gen_len, least[1])
    return self._loaded.prepare(
      self._request(longest, gen_len, len(ids)),
      any(r.may_stop for r in requests),
      self.on_progress,
    )

  def _request(
    self, prompt_len: int, gen_len: int, prompts: int | None
  ) -> search.Request:
    size, batches = self.batch_size, self._num_batches
    if self._settled is not None:
      size, batches = self._settled
      prompts = None
    request = search.Request(
      prompt_len=-(-prompt_len // _COLUMNS) * _COLUMNS,
      gen_len=gen_len,
      prompts=prompts,
      batch_size=size,
      num_batches=batches,
      max_latency=self._max_latency,
    )
    return request.clamped()

  def _blocks(self, ids, work: Workload):
    return blocks(
      ids,
      batch_size=work.batch_size,
      num_batches=work.num_batches,
      prompt_len=work.prompt_len,
      pad_id=self.config.pad_id,
    )
