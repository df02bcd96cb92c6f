"""The figures of a run: one record, its JSON and its table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexjax.config import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
  """What a run measured.

  Attributes:
    prefill_seconds: until every prompt's first token was there.
    decode_seconds: from then on.
    generated_tokens: tokens handed out, an ending eos included.
    peak_bytes: most bytes of each tier: allocations and what was in flight.
    link_bytes: bytes that crossed each link.
    link_busy_fraction: part of the run's time in which a copy was under way.
    placement: achieved fractions of weights, cache and hidden by tier.
    compilations: functions compiled since the model was opened.
    load_seconds: time to fill the tiers with weights.
    scored_tokens: log-probabilities handed out.
    allocator_peak_bytes: what the device's own allocator says it held at most
      since the process began; None where it does not say.
    stored: dtype, bits, groups and rounding of weights, bits of the cache.
    block: batch size, number of batches and place of attention, as planned.
    first_tokens: requests that got a token: what the prefill generated.
    predicted: what the plan expected, if every block were full and every
      request got all its tokens: see `simulate.Prediction`.
  """

  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  generated_tokens: int = 0
  scored_tokens: int = 0
  peak_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  link_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  link_busy_fraction: float = 0.0
  placement: Mapping[str, Mapping[str, float]] = dataclasses.field(
    default_factory=dict
  )
  compilations: int = 0
  load_seconds: float = 0.0
  stored: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  block: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  first_tokens: int = 0
  allocator_peak_bytes: int | None = None
  predicted: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def throughput_tokens_per_s(self) -> float:
    """Generated tokens / (prefill + decode time)."""
    seconds = self.prefill_seconds + self.decode_seconds
    return self.generated_tokens / seconds if seconds else 0.0

  @property
  def decode_tokens_per_s(self) -> float:
    """Tokens after the first of each request / decode time."""
    tokens = self.generated_tokens - self.first_tokens
    return tokens / self.decode_seconds if self.decode_seconds else 0.0

  def to_json(self) -> dict[str, Any]:
    """Returns a dict of plain numbers, keyed as the attributes are named."""
    fields = dataclasses.asdict(self)
    del fields['first_tokens']
    for name in ('scored_tokens', 'allocator_peak_bytes'):
      if not fields[name]:  # not a run of that kind, or unknown here
        del fields[name]
    for name in ('throughput_tokens_per_s', 'decode_tokens_per_s'):
      fields[name] = getattr(self, name)
    return fields

  def _bits(self) -> str:
    bits = [self.stored.get(f'{n}_bits', 16) for n in ('weight', 'cache')]
    return f'{bits[0]} bits (weights), {bits[1]} bits (cache)'

  def _block(self) -> str:
    if not self.block:
      return ''
    return '{batch_size}x{num_batches}, attention on {attention}'.format(
      **self.block
    )

  def _predicted(self) -> str:
    if not self.predicted or not self.generated_tokens:
      return ''
    rate = self.predicted['throughput_tokens_per_s']
    binding = (
      f'{phase} bound by {name.replace("_", " ")}'
      for phase, name in self.predicted['binding'].items()
    )
    return f'{rate:.1f} tokens/s once compiled ({", ".join(binding)})'

  def rows(self) -> list[tuple[str, str]]:
    """Returns label and value of a short table."""
    rows = [
      ('computed in', self.stored.get('dtype', '')),
      ('stored in', self._bits()),
      ('block', self._block()),
      ('load', f'{self.load_seconds:.2f} s'),
      ('prefill', f'{self.prefill_seconds:.2f} s'),
      ('decode', f'{self.decode_seconds:.2f} s'),
      ('generated', f'{self.generated_tokens} tokens'),
      ('throughput', f'{self.throughput_tokens_per_s:.1f} tokens/s'),
      ('predicted', self._predicted()),
      ('decode only', f'{self.decode_tokens_per_s:.1f} tokens/s'),
    ]
    if self.scored_tokens:
      rows[5:] = [('scored', f'{self.scored_tokens} tokens')]
    for name, split in self.placement.items():
      parts = (f'{100 * part:.0f} % {tier}' for tier, part in split.items())
      rows.append((f'{name} on', ', '.join(parts)))
    peaks = (f'{format_bytes(n)} {t}' for t, n in self.peak_bytes.items())
    rows.append(('peak memory', ', '.join(peaks)))
    for link, count in self.link_bytes.items():
      if count:
        rows.append((link.replace('_', ' '), format_bytes(count)))
    rows.append(('links busy', f'{100 * self.link_busy_fraction:.0f} %'))
    rows.append(('compilations', str(self.compilations)))
    return rows
