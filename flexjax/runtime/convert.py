"""Writes a model's whole disk tier, ahead of its use."""

from collections.abc import Callable
from pathlib import Path

from flexjax.config import Policy, format_bytes, parse_bits
from flexjax.errors import InputError
from flexjax.runtime import devices, sources
from flexjax.runtime.weights import Weights
from flexjax.tiers.disk import DiskTier


def convert(
  model: str | Path | None,
  disk_dir: str | Path,
  *,
  dtype: str = 'auto',
  weight_bits: int | str | None = None,
  group_size: int | None = None,
  rounding: str | None = None,
  random_weights: bool = False,
  weights_seed: int = 0,
  on_group: Callable[[int, int], None] = lambda done, total: None,
  on_profile: Callable[[int, int], None] = lambda done, total: None,
) -> str:
  """Writes every weight group that `disk_dir` does not hold yet.

  The folder is then a model of its own, which needs the checkpoint no more.
  Peak memory is a few pieces of at most 32 MiB, whatever the model; to pack
  with `search`, one layer as well and what it computes for 2,048 tokens.

  Args:
    dtype: 'auto' is the checkpoint's, and on a CPU, which is slow at
      float16, bfloat16 in its place.
    weight_bits, group_size, rounding: see `config.Policy`.
    on_group, on_profile: called with what is done, and of how much: weight
      groups that are written, layers that are looked at before packing.

  Returns:
    One line that says what the folder holds now.

  Raises:
    InputError: the model is not whole, the directory holds other weights,
      cannot be written, or has too little room.
  """
  sources.check_dtype(dtype)
  policy = Policy(
    weight_bits=parse_bits(weight_bits, 'weight_bits'),
    group_size=group_size,
    rounding=rounding,
  )
  root = Path(disk_dir)
  source = sources.find_source(
    model, random_weights=random_weights, seed=weights_seed
  )
  machine = devices.machine()
  weights = Weights(source, root, dtype, policy)
  weights.on_profile = on_profile
  dtype = weights.settled or source.config.checkpoint_dtype
  if not weights.settled and dtype == 'float16' and machine.platform == 'cpu':
    dtype = 'bfloat16'
  form = weights.form(dtype)
  sizes, complete = weights.group_bytes(form), weights.folder(form).complete
  todo = sum(n for g, n in enumerate(sizes) if g not in complete)
  if todo > (free := devices.free_disk(root)):
    raise InputError(
      f"'{root}' has {format_bytes(free)} free, but {format_bytes(todo)} are "
      'to be written'
    )
  disk = DiskTier(root, machine.pinned, machine.device)
  try:
    weights.write(form, disk, on_group)
  finally:
    disk.close()
  return (
    f"'{root}' holds {source.name} in {form}: {format_bytes(sum(sizes))}, "
    f'{format_bytes(todo)} of it written now'
  )
