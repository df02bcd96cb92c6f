"""Fractions -> a tier for every key, spread evenly over the layers.

No tensor straddles tiers: a fraction is met by many keys. Slow keys lie
between fast ones, so that their loads hide behind resident layers.
"""

from collections.abc import Iterable, Mapping

from flexjax.config import Split
from flexjax.typing import Key

TIERS = ('device', 'host', 'disk')


def spread(sizes: Mapping[Key, int], split: Split) -> dict[Key, str]:
  """Assigns every key the tier that lags furthest behind its share.

  The largest key, where there is one (the token table), goes to the highest
  tier whose share holds it: streamed, it would need a buffer of its own size.

  Args:
    sizes: bytes of every key, in the order in which they are used.
    split: percentages asked for.

  Returns:
    A tier for every key. Between two tiers the achieved fraction is within
    half of the largest key of the asked one, between three within five sixths.
  """
  whole = sum(sizes.values())
  share = dict(zip(TIERS, (whole * p / 100 for p in split), strict=True))
  # A tier that was not asked for gets nothing, whatever the rounding.
  asked = [tier for tier in TIERS if share[tier]]
  places: dict[Key, str] = {}
  if (large := _single_largest(sizes)) is not None:
    fits = [tier for tier in asked if share[tier] >= sizes[large]]
    if fits:
      places[large] = fits[0]
      share[fits[0]] -= sizes[large]
      whole -= sizes[large]
  lag = dict.fromkeys(TIERS, 0.0)
  for key, size in sizes.items():
    if key in places:
      continue
    for tier in asked:
      lag[tier] += share[tier] / whole * size
    best = max(asked, key=lambda tier: lag[tier])
    lag[best] -= size
    places[key] = best
  return {key: places[key] for key in sizes}


def _single_largest(sizes: Mapping[Key, int]) -> Key | None:
  ranked = sorted(sizes, key=lambda key: -sizes[key])
  if len(ranked) < 2 or sizes[ranked[0]] == sizes[ranked[1]]:
    return None
  return ranked[0]


def total(
  sizes: Mapping[Key, int], places: Mapping[Key, str]
) -> dict[str, int]:
  """Returns the bytes that every tier holds."""
  held = dict.fromkeys(TIERS, 0)
  for key, size in sizes.items():
    held[places[key]] += size
  return held


def achieved(
  sizes: Mapping[Key, int], places: Mapping[Key, str]
) -> dict[str, float]:
  """Returns the fraction of bytes in every tier; all zero where none are."""
  whole = sum(sizes.values()) or 1
  return {tier: held / whole for tier, held in total(sizes, places).items()}


def window(sizes: Iterable[int], width: int) -> int:
  """Returns the largest sum of `width` consecutive sizes, going round.

  It is what a load-ahead of `width` - 1 steps holds at most.
  """
  ring = list(sizes)
  if not ring:
    return 0
  rounds, width = divmod(width, len(ring))
  most = held = sum(ring[:width])
  for n, size in enumerate(ring):
    held += ring[(n + width) % len(ring)] - size
    most = max(most, held)
  return rounds * sum(ring) + most
