"""How many bytes things have: pure functions of model, workload and format.

Each formula stands once: the plan and the budget check evaluate these, and the
runtime reports the same quantities.
"""

from flexjax.config import (
  QUERY_CHUNK,
  SCORE_BYTES,
  UNPACKED,
  ModelConfig,
  Packing,
  Workload,
)

_F32 = 4
SCORED_BYTES = 64 * 2**20  # of float32 logits that scoring holds at once


def cache_bytes(
  config: ModelConfig, work: Workload, packing: Packing, itemsize: int
) -> int:
  """Bytes of one (layer, batch) KV cache: keys and values [B, N, S, H]."""
  row = config.num_heads * packing.row_bytes(config.head_size, itemsize)
  return 2 * work.batch_size * work.cache_len * row


def expanded_bytes(
  config: ModelConfig, kind: str, packing: Packing, itemsize: int
) -> int:
  """Bytes of a layer's packed matrices while they are expanded: nothing where
  they are not packed."""
  d, f = config.hidden_size, config.ffn_size
  sizes = {'attention': 4 * d * d, 'mlp': 2 * d * f}
  return itemsize * sizes.get(kind, 0) if packing.packs else 0


def hidden_bytes(config: ModelConfig, work: Workload, itemsize: int) -> int:
  """Bytes of one batch's hidden states [B, T, D], in prefill."""
  return work.batch_size * work.prompt_len * config.hidden_size * itemsize


def chunk_rows(batch: int, columns: int, chunk_tokens: int) -> int:
  """Rows of a prefill that go through a layer together: a divisor of all."""
  most = max(1, chunk_tokens // columns)
  return next(n for n in range(min(batch, most), 0, -1) if batch % n == 0)


def workspace(
  config: ModelConfig,
  work: Workload,
  itemsize: int,
  packing: Packing = UNPACKED,
  *,
  cache_itemsize: int,
  chunk_tokens: int,
  prefill: bool,
  fused: bool = False,
) -> int:
  """Bytes a layer function needs beside its inputs: the most of any layer.

  A prefill goes in chunks of rows, of at most `chunk_tokens`, beside the whole
  batch's result and new rows. Attention holds the fused product in float32
  (3 d), its transposed copy, the normalised input or the attended values, and
  a chunk of scores twice. The MLP holds its inner activations (f), once in
  float32 and once in the compute type. The head holds float32 logits of one
  position, four times while it sorts them. A packed cache is expanded whole in
  decode, keys and values, unless attention is `fused` and reads it as it is,
  beside the scores of the whole cache, which are there four times where queries
  are doubled.
  """
  d, f = config.hidden_size, config.ffn_size
  columns = work.prompt_len if prefill else 1
  everything = work.batch_size * columns * d * itemsize
  if prefill:
    rows = chunk_rows(work.batch_size, columns, chunk_tokens)
    row_scores = _F32 * config.num_heads * min(columns, QUERY_CHUNK) * columns
    together = min(rows, max(1, SCORE_BYTES // row_scores))
    scores = 2 * together * row_scores
  else:
    rows = work.batch_size
    seen = work.prompt_len + work.gen_len
    scores = 4 * rows * config.num_heads * seen * _F32
    if packing.packs and not fused:
      scores += cache_bytes(config, work, UNPACKED, cache_itemsize)
  tokens = rows * columns
  attention = tokens * d * (3 * _F32 + 4 * itemsize)
  attention += scores + 3 * everything  # result, rows
  mlp = tokens * (f * (_F32 + itemsize) + d * (2 * _F32 + 2 * itemsize))
  logits = work.batch_size * config.vocab_size * _F32
  head = 4 * logits
  if not work.gen_len:
    head = 3 * max(SCORED_BYTES, config.vocab_size * _F32)
  return max(attention, mlp + everything, head + everything)
