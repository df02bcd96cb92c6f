"""Small things to place, whose bytes one can add up by hand."""

import math

from flexjax.config import ModelConfig, Workload
from flexjax.hardware import Curve
from flexjax.policy.placement import TIERS
from flexjax.policy.problem import CLASSES, Problem

CONFIG = ModelConfig(
  num_layers=4,
  num_heads=4,
  hidden_size=64,
  ffn_size=256,
  embed_size=64,
  vocab_size=1000,
  max_positions=256,
)
LAYERS = (
  ('embed', (0, 1)),
  *((kind, (2 + n,)) for n, kind in enumerate(('attention', 'mlp') * 4)),
  ('head', (0, 10)),
)
GROUPS = (256_000, 66_000, *(66_000, 132_000) * 4, 512)
PLENTY = 2**40


def problem(
  *,
  batch_size=4,
  num_batches=2,
  prompt_len=16,
  gen_len=8,
  device=PLENTY,
  host=PLENTY,
  disk=PLENTY,
  **fields,
) -> Problem:
  """A model of 4 layers in float32."""
  standard = {
    'config': CONFIG,
    'layers': LAYERS,
    'group_bytes': GROUPS,
    'dtype': 'float32',
    'cache_dtype': 'float32',
    'unified': False,
    'budgets': {'device': device, 'host': host, 'disk': disk},
    'work': Workload(
      batch_size=batch_size,
      num_batches=num_batches,
      prompt_len=prompt_len,
      gen_len=gen_len,
    ),
  }
  return Problem(**standard | fields)


def shares(**at: str | tuple) -> dict[str, dict[str, float]]:
  """Fractions of every class: a tier's name, or all three; else the device."""
  found = {}
  for name in CLASSES:
    place = at.get(name, 'device')
    if isinstance(place, str):
      place = tuple(float(tier == place) for tier in TIERS)
    assert math.isclose(sum(place), 1)
    found[name] = dict(zip(TIERS, place, strict=True))
  return found


def rate(per_s: float) -> Curve:
  """Seconds in proportion, from a byte on."""
  return Curve(((1, 1 / per_s), (1e15, 1e15 / per_s)))
