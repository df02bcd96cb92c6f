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

  Args:
    sizes: bytes of every key, in the order in which they are used.
    split: percentages asked for.

  Returns:
    A tier for every key. Between two tiers the achieved fraction is within
    half of the largest key of the asked one, between three within two thirds.
  """
  shares = dict(zip(TIERS, (part / 100 for part in split), strict=True))
  lag = dict.fromkeys(TIERS, 0.0)
  places = {}
  for key, size in sizes.items():
    for tier, share in shares.items():
      lag[tier] += share * size
    # A tier that was not asked for gets nothing, whatever the rounding.
    best = max((t for t in TIERS if shares[t]), key=lambda t: lag[t])
    lag[best] -= size
    places[key] = best
  return places


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
  width = min(width, len(ring))
  ring += ring[:width]
  return max(
    (sum(ring[n : n + width]) for n in range(len(ring) - width + 1)), default=0
  )
