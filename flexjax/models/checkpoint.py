"""Hugging Face checkpoints of the OPT family as a source of weights.

It hides from the runtime which container the weights are in, how tensors are
spread over files and what they are called there. A checkpoint is verified
when it is opened; then one group at a time streams through in pieces.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexjax.config import DTYPE_BYTES
from flexjax.errors import InputError, UnusableWeights
from flexjax.models.hf_config import read_config, read_json
from flexjax.models.hf_names import canonical, layout
from flexjax.models.tensor_file import LazyTensor, open_safetensors
from flexjax.models.torch_file import open_torch
from flexjax.typing import Piece

# Half of what a piece may hold: a reader's loop holds the one before as well.
_PIECE_BYTES = 32 * 2**20
_CAST_BYTES = 4 * 2**20  # converted at once, so that copies stay small
_SOURCES = (
  ('model.safetensors', open_safetensors),
  ('model.safetensors.index.json', open_safetensors),
  ('pytorch_model.bin', open_torch),
  ('pytorch_model.bin.index.json', open_torch),
)
# Left behind by older versions of the model; never read by it.
_LEFTOVERS = {'version', 'embed_positions._float_tensor'}
_FLOATS = ('float64', 'float32', 'float16', 'bfloat16')


class Checkpoint:
  """A directory with `config.json` and weights; a WeightSource.

  Attributes:
    path: the directory.
    config: the model that it holds.
    fingerprint: changes when config.json, or the name, size or modification
      time of a weight file changes.

  Any number of threads may read from one checkpoint at a time.
  """

  def __init__(self, path: Path) -> None:
    if not path.is_dir():
      raise InputError(f'{path} is not a directory')
    self.path = path
    self.config = read_config(path / 'config.json')
    files, tensors = _open_weights(path)
    self._tensors = canonical(tensors)
    self._layout = layout(self.config)
    self._find_dtype()
    self._stamp = functools.partial(_fingerprint, path / 'config.json', files)
    self.fingerprint = self._stamp()

  @classmethod
  def open(cls, path: str | Path) -> 'Checkpoint':
    """Opens and verifies a checkpoint; reads headers only.

    Raises:
      InputError: something is missing, truncated or does not fit
        config.json; one line that names the file, and the tensor if any.
    """
    checkpoint = cls(Path(path))
    checkpoint.verify()
    return checkpoint

  def verify(self) -> None:
    """Compares the tensors with what config.json describes.

    Raises:
      InputError: a tensor is missing, has another shape, is not of a floating
        type, or has no place in the model.
    """
    expected = {
      part.name: part.shape
      for group in self._layout
      for parts in group.values()
      for part in parts
    }
    for name, shape in expected.items():
      if (tensor := self._tensors.get(name)) is None:
        raise InputError(f"{self.path} has no tensor '{name}'")
      if tensor.shape != shape:
        raise InputError(
          f"{tensor.path}: tensor '{tensor.name}' has shape {tensor.shape}, "
          f'config.json makes it {shape}'
        )
      if tensor.dtype.name not in _FLOATS:
        raise InputError(
          f"{tensor.path}: tensor '{tensor.name}' is stored as "
          f'{tensor.dtype.name}, not as floating-point numbers'
        )
    extra = self._tensors.keys() - expected.keys() - _LEFTOVERS
    for name in sorted(extra):
      tensor = self._tensors[name]
      if name == 'lm_head.weight':
        self._verify_tied(tensor)
        continue
      raise InputError(
        f"{tensor.path}: tensor '{tensor.name}' has no place in the model "
        'that config.json describes'
      )

  def _find_dtype(self) -> None:
    """Takes the token table's dtype where config.json does not say one."""
    fields = read_json(self.path / 'config.json')
    table = self._tensors.get('embed_tokens.weight')
    stated = fields.get('dtype') or fields.get('torch_dtype')
    if not stated and table and table.dtype.name in DTYPE_BYTES:
      self.config = dataclasses.replace(
        self.config, checkpoint_dtype=table.dtype.name
      )

  def _verify_tied(self, head: LazyTensor) -> None:
    """Accepts a second copy of the token table, judged by 64 rows of it."""
    table = self._tensors['embed_tokens.weight']
    same = head.shape == table.shape and all(
      np.array_equal(head.rows(n, n + 1), table.rows(n, n + 1), equal_nan=True)
      for n in np.linspace(0, table.shape[0] - 1, 64).astype(int).tolist()
    )
    if not same:
      raise InputError(
        f"{head.path}: tensor '{head.name}' differs from the token table, "
        'but config.json says tie_word_embeddings'
      )

  def pieces(self, group: int, dtype: Any) -> Iterator[Piece]:
    """Yields weight group `group` as pieces of at most 32 MiB, in `dtype`.

    A single row that is larger makes a piece of its own.

    Raises:
      InputError: a file has changed since it was opened.
      UnusableWeights: a weight is not finite or too large for `dtype`.
    """
    # Else what is read now would be kept under the name of what was there.
    if not self._unchanged():
      raise InputError(f"'{self.path}' has changed since it was opened")
    dtype = np.dtype(dtype)
    for name, parts in self._layout[group].items():
      tensors = [self._tensors[part.name] for part in parts]
      if name == 'vectors':
        packed = [_read(t, 0, t.shape[0], dtype) for t in tensors]
        yield Piece(name, 0, np.concatenate(packed))
        continue
      row = 0
      for tensor in tensors:
        count = tensor.shape[0]
        step = _rows_within(_PIECE_BYTES, tensor, dtype)
        for begin in range(0, count, step):
          array = _read(tensor, begin, min(begin + step, count), dtype)
          yield Piece(name, row + begin, array)
          del array  # Else it lives on while the next one is read.
        row += count

  def _unchanged(self) -> bool:
    try:
      return self._stamp() == self.fingerprint
    except OSError:  # a file has gone
      return False


def _rows_within(limit: int, tensor: LazyTensor, dtype: np.dtype) -> int:
  size = max(tensor.dtype.itemsize, dtype.itemsize)
  return max(1, limit // (size * tensor.shape[1]))


def _read(
  tensor: LazyTensor, begin: int, end: int, dtype: np.dtype
) -> np.ndarray:
  """Reads rows [begin, end) in `dtype`, rounding to nearest."""
  if tensor.dtype == dtype:
    return _finite(tensor, tensor.rows(begin, end))
  out = np.empty((end - begin, *tensor.shape[1:]), dtype)
  step = end - begin
  if out.ndim > 1:
    step = _rows_within(_CAST_BYTES, tensor, dtype)
  try:
    with np.errstate(over='raise'):
      for low in range(begin, end, step):
        high = min(low + step, end)
        rows = tensor.rows(low, high)
        if rows.dtype.itemsize == 2:
          # bfloat16's own cast to float16 does not report an overflow.
          rows = rows.astype(np.float32)
        out[low - begin : high - begin] = rows
  except FloatingPointError:
    raise UnusableWeights(
      f"{tensor.path}: tensor '{tensor.name}' has values too large for "
      f'{dtype.name}; use bfloat16 or float32'
    ) from None
  return _finite(tensor, out)


def _finite(tensor: LazyTensor, array: np.ndarray) -> np.ndarray:
  """Returns the array if all of it is finite.

  Numbers of a sign, read as integers, are in their own order, and what is not
  finite comes last: two maxima are much faster than looking at every one.
  """
  bits = 8 * array.itemsize
  last = np.array(np.inf, array.dtype).view(f'u{array.itemsize}')
  for kind, limit in (('i', int(last)), ('u', int(last) | 1 << (bits - 1))):
    if array.size and array.view(f'{kind}{array.itemsize}').max() >= limit:
      raise UnusableWeights(
        f"{tensor.path}: tensor '{tensor.name}' holds numbers that are not "
        'finite'
      )
  return array


def _open_weights(path: Path) -> tuple[list[Path], dict[str, LazyTensor]]:
  """Returns the weight files of a directory and all tensors in them."""
  for name, reader in _SOURCES:
    if not (path / name).exists():
      continue
    if not name.endswith('.index.json'):
      return [path / name], dict(reader(path / name))
    return _open_shards(path / name, reader)
  raise InputError(
    f'{path} holds no weights: expected one of '
    f'{", ".join(name for name, _ in _SOURCES)}'
  )


def _open_shards(index: Path, reader) -> tuple[list[Path], dict]:
  """Opens the files that an index lists, and checks them against it."""
  places = read_json(index).get('weight_map')
  if not isinstance(places, dict) or not all(
    isinstance(shard, str) and shard == Path(shard).name
    for shard in places.values()
  ):
    raise InputError(f'{index} has no weight_map of file names beside it')
  files = [index.parent / shard for shard in sorted(set(places.values()))]
  tensors: dict[str, LazyTensor] = {}
  for file in files:
    if not file.exists():
      raise InputError(f'{file} is missing, but {index.name} lists it')
    tensors |= reader(file)
  for name, shard in places.items():
    if name not in tensors:
      raise InputError(
        f"{index.parent / shard} lacks tensor '{name}', which {index.name} "
        'says it holds'
      )
  return files, tensors


def _fingerprint(config: Path, files: list[Path]) -> str:
  digest = hashlib.sha256(config.read_bytes())
  for file in files:
    stat = file.stat()
    digest.update(f'\n{file.name} {stat.st_size} {stat.st_mtime_ns}'.encode())
  return digest.hexdigest()
