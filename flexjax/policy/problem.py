"""What is to be placed, and how many bytes every part of it has."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence

from flexjax.config import (
  DTYPE_BYTES,
  UNPACKED,
  ModelConfig,
  Packing,
  Workload,
)
from flexjax.policy import volume
from flexjax.typing import Key

# In order of claim to the fastest memory: a cache is written as well as read.
CLASSES = ('hidden', 'cache', 'weights')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is to be placed.

  Attributes:
    layers: kind and weight groups of every layer, in order.
    group_bytes: bytes of every weight group.
    dtype: of hidden states and of computing.
    cache_dtype: of a cache that is not packed, and of an expanded one.
    packing, cache_packing: how matrices and the cache are stored.
    unified: host and device are one memory, and reads from it move nothing.
    budgets: bytes of each tier; disk 0 where there is none.
    kept: bytes on the device beside all keys, for as long as the model is.
    spare: bytes of the device that its allocator cannot make use of.
    chunk_tokens: see `Compute`.
    fused: attention reads a packed cache as it is, without expanding it.
    disk_flag: what gives a disk where there is none, for advice; '' where
      nothing does.
  """

  config: ModelConfig
  work: Workload
  layers: Sequence[tuple[str, tuple[int, ...]]]
  group_bytes: Sequence[int]
  dtype: str
  cache_dtype: str
  unified: bool
  budgets: Mapping[str, int]
  packing: Packing = UNPACKED
  cache_packing: Packing = UNPACKED
  kept: int = 0
  spare: int = 0
  chunk_tokens: int = 4096
  fused: bool = False
  disk_flag: str = '--disk_dir'

  @property
  def itemsize(self) -> int:
    """Bytes of an element of hidden states."""
    return DTYPE_BYTES[self.dtype]

  @property
  def cache_itemsize(self) -> int:
    """Bytes of an element of a cache that is not packed, or expanded."""
    return DTYPE_BYTES[self.cache_dtype]

  @functools.cached_property
  def share(self) -> bool:
    """Whether packed matrices are expanded once for all batches of a visit:
    unless a layer's take more than a quarter of the device."""
    layer = volume.expanded_bytes(
      self.config, 'mlp', self.packing, self.itemsize
    )
    return 4 * layer <= self.budgets['device']

  @property
  def cache_bytes(self) -> int:
    """Bytes of one (layer, batch) cache."""
    return volume.cache_bytes(
      self.config, self.work, self.cache_packing, self.cache_itemsize
    )

  @functools.cached_property
  def kinds(self) -> Mapping[str, int]:
    """How many layers there are of every kind."""
    return Counter(kind for kind, _ in self.layers)

  @functools.cached_property
  def cached(self) -> tuple[int, ...]:
    """Layers that keep a KV cache."""
    kinds = [kind for kind, _ in self.layers]
    return tuple(j for j, kind in enumerate(kinds) if kind == 'attention')

  @functools.cached_property
  def layer_bytes(self) -> tuple[int, ...]:
    """Bytes of every layer's weights."""
    groups = self.group_bytes
    return tuple(sum(groups[g] for g in mine) for _, mine in self.layers)

  @functools.cached_property
  def expanded_bytes(self) -> tuple[int, ...]:
    """Bytes of every layer's packed matrices while they are expanded."""
    sizes = {
      kind: volume.expanded_bytes(
        self.config, kind, self.packing, self.itemsize
      )
      for kind in self.kinds
    }
    return tuple(sizes[kind] for kind, _ in self.layers)

  @functools.cached_property
  def _parts(self) -> Mapping[Key, str]:
    """Which part of which kind of layer a weight group is."""
    parts: dict[Key, str] = {}
    for kind, groups in self.layers:
      for n, group in enumerate(groups):
        parts.setdefault(('weights', group), f'{kind} {n}')
    return parts

  def shape_of(self, key: Key) -> str:
    """Returns a name that keys share whose values have the same shapes."""
    return self._parts.get(key, str(key[0]))

  def sizes(self, name: str) -> dict[Key, int]:
    """Bytes of every key of a class, in the order of use."""
    batches = range(self.work.num_batches)
    if name == 'weights':
      sizes = enumerate(self.group_bytes)
      return {('weights', g): size for g, size in sizes if size}
    if name == 'hidden':
      size = volume.hidden_bytes(self.config, self.work, self.itemsize)
      return {('hidden', k): size for k in batches}
    if not self.work.cache_len:
      return {}
    size = self.cache_bytes
    return {('cache', j, k): size for j in self.cached for k in batches}
