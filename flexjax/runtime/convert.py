"""Writes a model's whole disk tier, ahead of its use."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from flexjax.config import format_bytes
from flexjax.errors import InputError
from flexjax.models import opt
from flexjax.runtime import devices, loading, sources
from flexjax.tiers.disk import DiskTier


def convert(
  model: str | Path | None,
  disk_dir: str | Path,
  *,
  dtype: str = 'auto',
  random_weights: bool = False,
  weights_seed: int = 0,
  on_group: Callable[[int, int], None] = lambda done, total: None,
) -> str:
  """Writes every weight group that `disk_dir` does not hold yet.

  Peak memory is a few pieces of at most 32 MiB, whatever the model.

  Args:
    dtype: 'auto' is the checkpoint's, and on a CPU, which is slow at
      float16, bfloat16 in its place.

  Returns:
    One line that says what the folder holds now.

  Raises:
    InputError: the model is not whole, the directory holds other weights,
      cannot be written, or has too little room.
  """
  sources.check_dtype(dtype)
  root = Path(disk_dir)
  source = sources.find_source(
    model, random_weights=random_weights, seed=weights_seed
  )
  machine = devices.machine()
  if dtype == 'auto':
    dtype = loading.held_dtype(root) or source.config.checkpoint_dtype
    if dtype == 'float16' and machine.platform == 'cpu':
      dtype = 'bfloat16'
  groups = opt.weight_groups(source.config)
  folder = loading.WeightFolder(root, loading.identity(source, dtype))
  sizes = loading.group_bytes(groups, jnp.dtype(dtype))
  todo = sum(n for g, n in enumerate(sizes) if g not in folder.complete)
  if todo > (free := devices.free_disk(root)):
    raise InputError(
      f"'{root}' has {format_bytes(free)} free, but {format_bytes(todo)} are "
      'to be written'
    )
  disk = DiskTier(root, machine.pinned, machine.device)
  done = 0

  def one(group: int) -> None:
    nonlocal done
    done += 1
    on_group(done, len(groups))

  try:
    loading.write_disk(
      source.weights,
      groups,
      range(len(groups)),
      jnp.dtype(dtype),
      disk,
      folder,
      one,
    )
  finally:
    disk.close()
  return (
    f"'{root}' holds {source.name} in {dtype}: {format_bytes(sum(sizes))}, "
    f'{format_bytes(todo)} of it written now'
  )
