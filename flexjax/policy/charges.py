"""What every kind of Action takes on a machine, in seconds.

The cost model adds these up and the simulator queues them one by one, so that
both charge the same. Amounts of work are those of the layer functions; how
long an amount takes is the hardware record's business.
"""

from flexjax.config import DISK_CACHE_CHUNK, QUERY_CHUNK, UNPACKED
from flexjax.hardware import Hardware
from flexjax.policy import volume
from flexjax.policy.problem import Problem


def computed_scores(prompt_len: int) -> int:
  """Scores of one head and prompt that a prefill computes.

  Queries go in chunks; a chunk's keys end where its queries do.
  """
  ends = [*range(QUERY_CHUNK, prompt_len, QUERY_CHUNK), prompt_len]
  begins = [0, *ends[:-1]]
  return sum((e - b) * e for b, e in zip(begins, ends, strict=True))


class Charges:
  """Seconds of a problem's Actions on a machine.

  Raises:
    InputError: the record says nothing of the problem's dtype.
  """

  def __init__(self, problem: Problem, hardware: Hardware):
    self.problem, self.hardware = problem, hardware
    self._mlp = hardware.of(hardware.mlp, problem.dtype)
    self._fresh = hardware.of(hardware.prefill_attention, problem.dtype)

  def layer(self, kind: str, prefill: bool, on_host: bool = False) -> float:
    """Device seconds of one layer for one batch, packed weights expanded.

    Args:
      on_host: the CPU attends to the cache meanwhile; see `attend_on_host`.
    """
    c, work = self.problem.config, self.problem.work
    d, f = c.hidden_size, c.ffn_size
    if kind == 'embed':
      return self._copy(prefill)
    if kind == 'mlp':
      return self._dense(2 * d * f, prefill)
    if kind == 'attention':
      seconds = self._dense(4 * d * d, prefill)
      if not (on_host and not prefill):
        seconds += self._attention(prefill)
      return seconds
    # The last position; to score, every one.
    rows = work.batch_size * (1 if work.gen_len else work.prompt_len)
    products = self._product(c.vocab_size * c.embed_size, rows)
    return products + self.hardware.pick(rows * c.vocab_size)

  def _dense(self, parameters: int, prefill: bool) -> float:
    """Products of a batch with matrices; a prefill goes in chunks of rows."""
    work, chunks = self.problem.work, self._chunks(prefill)
    tokens = work.batch_size * (work.prompt_len if prefill else 1)
    return chunks * self._product(parameters, tokens // chunks)

  def _chunks(self, prefill: bool) -> int:
    """Parts in which a batch goes through a layer function."""
    work = self.problem.work
    if not prefill:
      return 1
    return work.batch_size // volume.chunk_rows(
      work.batch_size, work.prompt_len, self.problem.chunk_tokens
    )

  def _product(self, parameters: int, rows: int) -> float:
    """An MLP layer of width D has 8 D^2 parameters; others have their part."""
    d = self.problem.config.hidden_size
    return self._mlp(d, rows, 2) * parameters / (8 * d * d)

  def _attention(self, prefill: bool) -> float:
    c, work = self.problem.config, self.problem.work
    packing = self.problem.cache_packing
    if prefill:
      heads = work.batch_size * c.num_heads
      scores = heads * computed_scores(work.prompt_len)
      return self._fresh(c.head_size, scores, 0) + self._pack(work.prompt_len)
    curves = self.hardware.decode_attention
    if self.problem.fused:
      attend = curves[str(packing.bits)]
      return attend(self.problem.cache_bytes) + self._pack(1)
    itemsize = self.problem.cache_itemsize
    nbytes = volume.cache_bytes(c, work, UNPACKED, itemsize)
    seconds = self.hardware.of(curves, self.problem.cache_dtype)(nbytes)
    if packing.packs:
      half = nbytes // itemsize // 2  # keys, then values
      seconds += 2 * self.hardware.expand[str(packing.bits)](half)
      seconds += self._pack(1)
    return seconds

  def _pack(self, tokens: int) -> float:
    packing = self.problem.cache_packing
    if not packing.packs or not self.problem.work.cache_len:
      return 0.0
    d, batch = self.problem.config.hidden_size, self.problem.work.batch_size
    # Keys and values.
    return self.hardware.pack[str(packing.bits)](2 * batch * tokens * d)

  def _copy(self, prefill: bool) -> float:
    return self.hardware.row_write['device'](self.hidden_bytes(prefill))

  def expand(self, kind: str) -> float:
    """Device seconds to expand a layer's packed matrices."""
    packing, d = self.problem.packing, self.problem.config.hidden_size
    if not packing.packs or kind not in ('attention', 'mlp'):
      return 0.0
    f = self.problem.config.ffn_size
    matrices = (3 * d * d, d * d) if kind == 'attention' else (d * f, d * f)
    curve = self.hardware.expand[str(packing.bits)]
    return sum(curve(size) for size in matrices)

  def expand_in_layer(self, kind: str, prefill: bool) -> float:
    """The same inside a layer function, once for every chunk of rows."""
    return self._chunks(prefill) * self.expand(kind)

  def attend_on_host(self) -> float:
    """CPU seconds of decode attention for one layer and batch."""
    problem, hardware = self.problem, self.hardware
    dtype, nbytes = problem.cache_dtype, problem.cache_bytes
    if problem.unified:  # the same cores, the same memory
      return hardware.of(hardware.decode_attention, dtype)(nbytes)
    return hardware.host_attend(dtype, nbytes)

  def write_rows(self, tier: str, prefill: bool, on_host: bool) -> float:
    """Seconds to put new cache rows in their place, in a tier: the device's,
    or the CPU's if it attends to the cache."""
    rates = self.hardware.row_write
    copied = tier == 'disk'  # so that the device may go on
    if copied:
      tier = 'device'
    if self._pads(tier, prefill, on_host):
      return rates['device'](self.problem.cache_bytes)
    if on_host and not self.problem.unified:
      tier = 'cpu' if 'cpu' in rates else 'host'
    return rates[tier](self.row_bytes(prefill, kept=not copied))

  def _pads(self, tier: str, prefill: bool, on_host: bool) -> bool:
    """Whether rows are made a whole cache on the device, and sent as that."""
    return (
      prefill and tier == 'host' and not on_host and not self.problem.unified
    )

  def sent_bytes(self, tier: str, prefill: bool, on_host: bool) -> int:
    """Bytes that cross the link to put new cache rows in their place."""
    if self.problem.work.cache_len and self._pads(tier, prefill, on_host):
      return self.problem.cache_bytes
    return self.row_bytes(prefill, kept=tier == 'disk')

  def row_bytes(self, prefill: bool, *, kept: bool) -> int:
    """Bytes of the new cache rows of one layer and batch: as a layer hands
    them out, or as the cache keeps them."""
    p, work = self.problem, self.problem.work
    if not work.cache_len:
      return 0
    itemsize = p.cache_itemsize if kept else p.itemsize
    size = volume.cache_bytes(p.config, work, p.cache_packing, itemsize)
    return size // work.cache_len * (work.prompt_len if prefill else 1)

  def disk_rows(self, prefill: bool) -> float:
    """Seconds of the disk to take new cache rows: to change one, a chunk of
    keys and one of values are read and written."""
    rows = self.row_bytes(prefill, kept=True)
    if prefill or not rows:
      return self.hardware.link('host_to_disk', rows)
    half = self.problem.cache_bytes // 2
    nbytes = 4 * min(half, DISK_CACHE_CHUNK)
    if curve := self.hardware.row_write.get('disk'):
      return curve(nbytes)
    return self.hardware.link('host_to_disk', nbytes)

  def hidden_bytes(self, prefill: bool) -> int:
    """Bytes of one batch's hidden states between two layers."""
    work = self.problem.work
    size = volume.hidden_bytes(self.problem.config, work, self.problem.itemsize)
    return size if prefill else size // work.prompt_len

  def query_bytes(self) -> int:
    """Bytes of one batch's queries, which the CPU attends with."""
    return self.hidden_bytes(False)
