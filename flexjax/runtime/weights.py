"""A model's weights: in which format, from where, into which tiers."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp

from flexjax.config import Packing, Policy
from flexjax.data import tokenizer
from flexjax.errors import InputError
from flexjax.runtime import devices, loading
from flexjax.runtime.folder import WeightFolder, read_manifest
from flexjax.runtime.formats import Format, PackedSource
from flexjax.runtime.sources import Source, check_dtype
from flexjax.runtime.store import Store
from flexjax.tiers.base import spec_bytes
from flexjax.tiers.disk import DiskTier
from flexjax.typing import WeightSource

OnGroup = Callable[[int, int], None]


class Weights:
  """The weights of `source`, and the folder that keeps them on disk.

  Args:
    disk_dir: None for the folder that the source is itself, if it is one.
    dtype: 'auto' takes what a folder holds, else what `auto` is told to be.
    policy: its bits, group size and rounding; None likewise.

  Attributes:
    settled: the dtype, where it does not depend on the work.

  Raises:
    InputError: something other is asked for than the source holds.
  """

  def __init__(
    self, source: Source, disk_dir: Path | None, dtype: str, policy: Policy
  ):
    check_dtype(dtype)
    self.source, self._policy = source, policy
    held = source.held
    self.root = disk_dir or (source.path if held else None)
    self._given = held is not None  # else a folder may still be replaced
    held = held or read_manifest(self.root)
    self._held = held.form if held else None
    self.settled = dtype if dtype != 'auto' else None
    if self._held and not self.settled:
      self.settled = self._held.dtype
    if self._given and self.form(self.settled or '') != self._held:
      raise InputError(
        f"'{source.name}' holds weights in {self._held}; not in "
        f'{self.form(self.settled or "")}: that takes the checkpoint'
      )

  def form(self, dtype: str) -> Format:
    """Returns the format of the weights, with `dtype`."""
    asked = self._policy
    held = self._held or Format(dtype)
    bits = asked.weight_bits or held.packing.bits
    if bits == 16:
      return Format(dtype)
    packing = Packing(bits, asked.group_size or held.packing.group_size)
    return Format(dtype, packing, asked.rounding or held.rounding)

  def group_bytes(self, form: Format) -> list[int]:
    """Returns the bytes of every weight group."""
    return [spec_bytes(spec) for spec in form.specs(self.source.config)]

  def disk_budget(self, form: Format) -> int:
    """Free bytes of the disk, and those that these weights take already."""
    if self.root is None:
      return 0
    sizes, complete = self.group_bytes(form), self.folder(form).complete
    return devices.free_disk(self.root) + sum(sizes[g] for g in complete)

  def folder(self, form: Format) -> WeightFolder:
    """Returns the disk tier's folder.

    Raises:
      InputError: it holds other weights.
    """
    assert self.root is not None
    source = self.source
    return WeightFolder(
      self.root, source.weights.fingerprint, form, source.config
    )

  def fill(
    self,
    form: Format,
    places: Mapping[int, str],
    store: Store,
    open_disk: Callable[[], DiskTier],
    on_group: OnGroup,
  ) -> None:
    """Brings every weight group to its place."""
    done = 0

    def one(group: int) -> None:
      nonlocal done
      done += 1
      on_group(done, len(places))

    specs, dtype = form.specs(self.source.config), jnp.dtype(form.dtype)
    folder = self.folder(form) if self.root else None
    source = self._source(form, folder)
    if on_disk := [g for g, tier in places.items() if tier == 'disk']:
      assert folder is not None
      loading.write_disk(
        source, specs, on_disk, dtype, open_disk(), folder, one
      )
      for group in on_disk:
        store.places['weights', group] = 'disk'
    elsewhere = {g: tier for g, tier in places.items() if tier != 'disk'}
    threads = min(os.cpu_count() or 1, 16)
    loading.fill_memory(source, specs, elsewhere, dtype, store, threads, one)

  def write(self, form: Format, disk: DiskTier, on_group: OnGroup) -> None:
    """Writes all that the folder does not hold, tokenizer included."""
    assert self.root is not None
    specs, folder = form.specs(self.source.config), self.folder(form)
    self._copy_tokenizer(self.root)
    loading.write_disk(
      self._source(form, folder),
      specs,
      range(len(specs)),
      jnp.dtype(form.dtype),
      disk,
      folder,
      lambda group: on_group(group + 1, len(specs)),
    )

  def _copy_tokenizer(self, root: Path) -> None:
    for name in tokenizer.FILES if self.source.path else ():
      mine, theirs = root / name, self.source.path / name
      if theirs.exists() and not mine.exists():
        new = mine.with_name(name + '.new')
        shutil.copyfile(theirs, new)
        new.replace(mine)

  def _source(self, form: Format, folder: WeightFolder | None) -> WeightSource:
    source = self.source.weights
    if form.packing.packs and not self._given:
      source = PackedSource(source, form)
    if folder is None:
      return source
    return loading.HeldWeights(
      folder.root,
      source.fingerprint,
      frozenset(folder.complete),
      form.specs(self.source.config),
      source,
    )
