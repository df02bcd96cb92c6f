"""A model's weights: in which format, from where, into which tiers."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flexjax import atomic
from flexjax.config import UNPACKED, Packing, Policy
from flexjax.data import tokenizer
from flexjax.errors import InputError, UnusableWeights
from flexjax.runtime import devices, loading
from flexjax.runtime.codec import Codec
from flexjax.runtime.folder import Held, WeightFolder, read_manifest, read_waves
from flexjax.runtime.formats import Format, PackedSource
from flexjax.runtime.profile import Profile, no_profile, profile
from flexjax.runtime.sources import Source, check_dtype
from flexjax.runtime.store import Store
from flexjax.tiers.base import spec_bytes
from flexjax.tiers.disk import DiskTier, discard
from flexjax.typing import WeightSource

OnGroup = Callable[[int, int], None]


class Weights:
  """The weights of `source`, and the folder that keeps them on disk.

  Args:
    disk_dir: None for the folder that the source is itself, if it is one.
    dtype: 'auto' takes what a folder holds, else leaves `settled` open.
    policy: its bits, group size and rounding; None likewise.

  Attributes:
    settled: the dtype, where it does not depend on the work.
    on_profile: called as on_profile(done, layers) while a row of random tokens
      goes through the model, before anything is packed.

  Raises:
    InputError: something other is asked for than the source holds.
  """

  def __init__(
    self, source: Source, disk_dir: Path | None, dtype: str, policy: Policy
  ):
    check_dtype(dtype)
    self.source, self._policy = source, policy
    self.root = disk_dir or (source.path if source.held else None)
    self._held = source.held or _begun(self.root)
    self._found: Profile | None = None
    self.on_profile: OnGroup = lambda done, total: None
    self.settled = dtype if dtype != 'auto' else None
    if self._held and not self.settled:
      self.settled = self._held.form.dtype
    if source.held:  # else a folder may still be replaced
      held, wanted = source.held.form, self.form(self.settled or '')
      if wanted.to_json() != held.to_json():
        raise InputError(
          f"'{source.name}' holds weights in {held}; to have them in {wanted} "
          'takes the checkpoint'
        )

  def form(self, dtype: str) -> Format:
    """Returns the format of the weights, with `dtype`."""
    asked = self._policy
    held = self._held.form if self._held else Format(dtype)
    bits = asked.weight_bits or held.packing.bits
    packing = UNPACKED
    if bits < 16:
      packing = Packing(bits, asked.group_size or held.packing.group_size)
    return Format(dtype, packing, asked.rounding or held.rounding)

  def lossy_forms(self, dtypes: Sequence[str]) -> list[Format]:
    """Returns 4-bit formats that a policy which leaves the bits open may take:
    none, if a folder settles how the weights are."""
    if self._held:
      return []
    size, rounding = self._policy.group_size, self._policy.rounding
    packing = Packing(4, size) if size else Packing(4)
    plain = Format(dtypes[0])
    return [
      Format(dtype, packing, rounding or plain.rounding) for dtype in dtypes
    ]

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
    """Brings every weight group to its place.

    Raises:
      UnusableWeights: the source cannot be stored so; the folder is empty then.
    """
    done = 0

    def one(group: int) -> None:
      nonlocal done
      done += 1
      on_group(done, len(places))

    specs, dtype = form.specs(self.source.config), jnp.dtype(form.dtype)
    folder = self.folder(form) if self.root else None
    with self._undone_if_unusable(form):
      source = self._source(form, folder)
      if on_disk := [g for g, tier in places.items() if tier == 'disk']:
        assert folder is not None
        disk = open_disk()
        self._claim(form, folder)
        loading.write_disk(source, specs, on_disk, dtype, disk, folder, one)
        for group in on_disk:
          store.places['weights', group] = 'disk'
      elsewhere = {g: tier for g, tier in places.items() if tier != 'disk'}
      threads = min(os.cpu_count() or 1, 16)
      loading.fill_memory(source, specs, elsewhere, dtype, store, threads, one)
      self._found = None  # hundreds of megabytes, for a large model

  def write(self, form: Format, disk: DiskTier, on_group: OnGroup) -> None:
    """Writes all that the folder does not hold, tokenizer included.

    Raises:
      UnusableWeights: as of `fill`.
    """
    assert self.root is not None
    specs, folder = form.specs(self.source.config), self.folder(form)
    with self._undone_if_unusable(form):
      self._claim(form, folder)
      loading.write_disk(
        self._source(form, folder),
        specs,
        range(len(specs)),
        jnp.dtype(form.dtype),
        disk,
        folder,
        lambda group: on_group(group + 1, len(specs)),
      )

  @contextmanager
  def _undone_if_unusable(self, form: Format) -> Iterator[None]:
    """Empties the folder of weights that can never be whole, lest they keep
    those of a mended checkpoint, or of another dtype, from it."""
    try:
      yield
    except UnusableWeights:
      if self.root and self.root.is_dir():
        # It holds others by now, or can only be read.
        with suppress(InputError, OSError):
          self._empty(form)
      raise

  def _empty(self, form: Format) -> None:
    folder = self.folder(form)
    with folder.locked():
      if not folder.claimed:
        return
      folder.forget()
      for group, spec in enumerate(form.specs(self.source.config)):
        discard(folder.root, ('weights', group), spec)
    self._held = None

  def waves(self, form: Format) -> np.ndarray:
    """Returns [num_layers, N, H, R], what keys have in common; see
    `quant.keys`. A folder that was written in packed form has it."""
    root = self.source.path if self.source.held else self.root
    held = self._held
    if root and held and held.waves and form.rounding == held.form.rounding:
      return read_waves(root, held.waves)
    return self._profile(form).waves

  def _profile(self, form: Format) -> Profile:
    """Returns what packing wants to know, found out at the first call."""
    if self._found is None:
      config = self.source.config
      source_form = form if self.source.held else Format(form.dtype)
      specs = source_form.specs(config)
      if self.source.random or not _searches(form):
        return no_profile(config, len(specs))
      codec = Codec(config, form.dtype, source_form.packing, UNPACKED)
      self._found = profile(
        self.source.weights, specs, config, codec, self.on_profile
      )
    return self._found

  def _claim(self, form: Format, folder: WeightFolder) -> None:
    """Writes what goes before weights: tokenizer, waves of packed models."""
    keeps = form.packing.packs and folder.waves is None
    if folder.complete and not keeps:
      return
    waves = self.waves(form) if keeps else None
    with folder.locked():
      if not folder.complete:
        self._copy_tokenizer(folder)
      if waves is not None and folder.waves is None:
        folder.keep(waves)

  def _copy_tokenizer(self, folder: WeightFolder) -> None:
    """Named in the manifest before they come, so that a tokenizer never stays
    without its weights."""
    path, root = self.source.path, folder.root
    files: list[Path] = []
    if path is not None and path.resolve() != root.resolve():
      files = [f for n in tokenizer.FILES if (f := path / n).exists()]
    folder.claim([file.name for file in files])
    for file in files:
      with atomic.replaced(root / file.name, alone=True) as new:
        shutil.copyfile(file, new)

  def _source(self, form: Format, folder: WeightFolder | None) -> WeightSource:
    source = self.source.weights
    if form.packing.packs and not self.source.held:
      everything = range(len(form.specs(self.source.config)))
      if folder is None or not folder.complete.issuperset(everything):
        source = PackedSource(source, form, self._profile(form).moments)
    if folder is None:
      return source
    return loading.HeldWeights(
      folder.root,
      source.fingerprint,
      frozenset(folder.complete),
      form.specs(self.source.config),
      source,
    )


def _begun(root: Path | None) -> Held | None:
  """What a folder holds; nothing, where weights were to come and none did."""
  held = read_manifest(root)
  return held if held and held.complete else None


def _searches(form: Format) -> bool:
  return form.rounding == 'search'
