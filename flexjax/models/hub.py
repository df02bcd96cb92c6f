"""Finds a checkpoint's directory: on this machine, or on Hugging Face's hub.

It hides from the runtime whether files were there or had to be fetched. What
is in the hub's local cache is used as it is; a download takes the files that
are read and no others, so never the same weights in two formats.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from flexjax.errors import InputError
from flexjax.models.hf_config import read_config, read_json

_HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', re.ASCII)
_SMALL_FILES = (
  'config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
)
# Of the first kind that a repository has, all files are taken.
_WEIGHTS = (
  ('model.safetensors', 'model.safetensors'),
  ('model.safetensors.index.json', 'model-*.safetensors'),
  ('pytorch_model.bin', 'pytorch_model.bin'),
  ('pytorch_model.bin.index.json', 'pytorch_model-*.bin'),
)


def find_checkpoint(model: str) -> Path:
  """Returns the directory of a model; downloads it if it must, and blocks.

  Args:
    model: a directory, or a hub id like `facebook/opt-30b`.

  Raises:
    InputError: it is neither; or it is not cached and the hub cannot be
      reached, does not have it, or has no OPT model under that name.
  """
  path = Path(model).expanduser()
  if model and path.is_dir():
    return path
  if path.exists() or not _HUB_ID.fullmatch(model):
    raise InputError(
      f"'{model}' is neither a directory nor a hub id like facebook/opt-125m"
    )
  return _find_cached(model) or _download(model)


def _find_cached(model: str) -> Path | None:
  """Returns the cached copy if it has everything that will be read."""
  try:
    folder = huggingface_hub.snapshot_download(
      model, local_files_only=True, allow_patterns=['config.json']
    )
  except Exception:  # Cached or not: a fault here must not stop a download.
    return None
  path = Path(folder)
  tokenizer = (path / 'tokenizer.json').exists() or (
    (path / 'vocab.json').exists() and (path / 'merges.txt').exists()
  )
  if not tokenizer or not (path / 'config.json').exists():
    return None
  for entry, _ in _WEIGHTS:
    if not (path / entry).exists():
      continue
    shards = {entry}
    if entry.endswith('.index.json'):
      shards = set(read_json(path / entry).get('weight_map', {}).values())
    return path if all((path / s).exists() for s in shards) else None
  return None


def _download(model: str) -> Path:
  """Fetches config.json, refuses what is no OPT, then fetches the rest."""
  try:
    # Not list_repo_files, which tries for 25 s to reach a hub that is away.
    files = huggingface_hub.model_info(model).siblings or []
    config = huggingface_hub.snapshot_download(
      model, allow_patterns=['config.json']
    )
    read_config(Path(config) / 'config.json')
    wanted = _choose(model, [f.rfilename for f in files])
    return Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
  except InputError:
    raise
  except GatedRepoError:
    raise InputError(
      f"'{model}' is gated: accept its terms on the hub, then run `hf auth "
      'login`'
    ) from None
  except RepositoryNotFoundError:
    raise InputError(
      f"there is no directory '{model}', and no such model on the hub (if it "
      'is private, run `hf auth login`)'
    ) from None
  except Exception as e:  # The HTTP client and its errors vary by version.
    reason = str(e).strip().splitlines() or ['']
    raise InputError(
      f"there is no directory '{model}', it is not in the hub's local cache, "
      f'and it cannot be downloaded: {type(e).__name__}: {reason[0]}'
    ) from None


def _choose(model: str, names: list[str]) -> list[str]:
  """Returns which files of a repository to fetch."""
  for entry, pattern in _WEIGHTS:
    if entry in names:
      wanted = {n for n in names if fnmatch(n, pattern)} | {entry}
      return sorted(wanted | (set(names) & set(_SMALL_FILES)))
  raise InputError(
    f"'{model}' has no weights that flexjax reads: neither safetensors nor "
    'pytorch_model.bin'
  )
