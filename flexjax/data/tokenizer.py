"""Text to token ids and back, as a checkpoint's own tokenizer does it.

It hides from everyone which files a tokenizer is kept in. Ids equal those of
`transformers.AutoTokenizer`, whose rules for combining the files are followed
here: what stands in `tokenizer.json` wins over `tokenizer_config.json`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from flexjax.errors import InputError

FILES = (
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
"""All files that a tokenizer may be kept in."""
UNKNOWN = '\N{REPLACEMENT CHARACTER}'
"""What stands in a text for bytes that are no UTF-8."""
_NAMES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
# What OPT was trained with, for directories that do not say.
_OPT_CONFIG = {
  'tokenizer_class': 'GPT2Tokenizer',
  'add_bos_token': True,
  'bos_token': '</s>',
  'eos_token': '</s>',
  'unk_token': '</s>',
  'pad_token': '<pad>',
}


class Tokenizer:
  """A byte-level BPE tokenizer.

  Attributes:
    bos_id, eos_id, pad_id: ids of these tokens; None where the files do not
      name them.
    vocab_size: number of ids; the model's table may have more rows.
  """

  def __init__(
    self, backend: tokenizers.Tokenizer, names: dict[str, str]
  ) -> None:
    self._backend = backend
    self.vocab_size: int = backend.get_vocab_size()
    self.bos_id, self.eos_id, self.pad_id = (
      backend.token_to_id(names[n]) if n in names else None
      for n in ('bos', 'eos', 'pad')
    )

  @classmethod
  def open(cls, path: Path) -> 'Tokenizer':
    """Opens the tokenizer in a checkpoint's directory.

    Reads tokenizer.json, or else vocab.json with merges.txt; both may be
    amended by tokenizer_config.json and older files beside it.

    Raises:
      InputError: files are missing or malformed; names them.
    """
    path = Path(path)
    config = _read_config(path)
    if (path / 'tokenizer.json').exists():
      backend = _load(path / 'tokenizer.json', config)
    else:
      backend = _build(path, config)
    # Blocks are padded, and prompts truncated, by whoever makes blocks.
    backend.no_padding()
    backend.no_truncation()
    names = _special_tokens(config)
    backend.add_tokens(_added_tokens(backend, config, names))
    backend.encode_special_tokens = bool(config.get('split_special_tokens'))
    if not (path / 'tokenizer.json').exists() and config.get('add_bos_token'):
      bos = str(names['bos'])
      backend.post_processor = processors.TemplateProcessing(
        single=[bos, '$A'], special_tokens=[(bos, backend.token_to_id(bos))]
      )
    return cls(backend, {n: str(t) for n, t in names.items()})

  def encode(self, text: str, leading: bool = True) -> list[int]:
    """Returns the ids of a text, with the leading token that the model wants.

    Special tokens written out in the text become their ids. Where `leading`
    is false, the text's own ids are all.

    Raises:
      InputError: the text has lone surrogates, which no encoding has.
    """
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise InputError(
        f'the text is not valid Unicode: a lone surrogate at character '
        f'{e.start}'
      ) from None
    return self._backend.encode(text, add_special_tokens=leading).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of some ids, special tokens left out.

    Ids beyond the vocabulary, which a padded table can produce, give nothing;
    bytes that are no UTF-8 give U+FFFD.
    """
    return self._backend.decode(list(ids), skip_special_tokens=True)

  def pieces(self, ids: Sequence[int]) -> list[str]:
    """Returns the part that each token has in the text of all.

    Where several tokens make a character, it is the last one's, and theirs is
    ''; so is that of special tokens.
    """
    pieces = []
    begin = 0  # of tokens whose text has not been handed out
    for end in range(1, len(ids) + 1):
      text = self.decode(ids[begin:end])
      if text.endswith(UNKNOWN) and end < len(ids):
        text = ''  # the next token may complete the character
      else:
        begin = end
      pieces.append(text)
    return pieces

  def spell(self, token: int) -> str:
    """Returns one token as the vocabulary writes it: special tokens by their
    names, bytes by the letters that stand for them; '' beyond it."""
    return self._backend.id_to_token(token) or ''


def _read_config(path: Path) -> dict[str, Any]:
  """Returns tokenizer_config.json with what older files add to it."""
  if not (path / 'tokenizer_config.json').exists():
    loose = not (path / 'tokenizer.json').exists()
    config = dict(_OPT_CONFIG) if loose else {}
  else:
    config = _read_object(path / 'tokenizer_config.json')
  if 'added_tokens_decoder' in config:
    return config
  if (path / 'special_tokens_map.json').exists():
    config |= _read_object(path / 'special_tokens_map.json')
  if (path / 'added_tokens.json').exists():
    added = _read_object(path / 'added_tokens.json')
    special = {str(t) for t in _special_tokens(config).values()}
    config['added_tokens_decoder'] = {
      n: {'content': token, 'special': token in special}
      for token, n in added.items()
    }
  return config


def _read_object(file: Path) -> dict[str, Any]:
  try:
    fields = json.loads(file.read_text(encoding='utf-8'))
  except OSError as e:
    raise InputError(f'cannot read {file}: {e.strerror}') from None
  except (ValueError, RecursionError) as e:
    raise InputError(f'{file} is not JSON: {e}') from None
  if not isinstance(fields, dict):
    raise InputError(f'{file} holds no JSON object')
  return fields


def _load(file: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
  """Reads tokenizer.json."""
  try:
    backend = tokenizers.Tokenizer.from_file(str(file))
  except Exception as e:  # The library raises nothing more specific.
    raise InputError(f'{file} is no tokenizer: {e}') from None
  kind = str(config.get('tokenizer_class', 'GPT2Tokenizer'))
  if kind.removesuffix('Fast') == 'GPT2Tokenizer':
    # This class rebuilds its parts and keeps the file's post-processor only.
    _make_byte_level(backend, config)
  return backend


def _build(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
  """Puts a tokenizer together from vocab.json and merges.txt."""
  files = path / 'vocab.json', path / 'merges.txt'
  for file in files:
    if not file.exists():
      raise InputError(
        f'{path} holds no tokenizer: expected tokenizer.json, or vocab.json '
        f'and merges.txt, but {file.name} is missing'
      )
  try:
    model = models.BPE.from_file(
      *map(str, files), continuing_subword_prefix='', end_of_word_suffix=''
    )
  except Exception as e:  # The library raises nothing more specific.
    raise InputError(
      f'{files[0]} and {files[1].name} are no vocabulary: {e}'
    ) from None
  backend = tokenizers.Tokenizer(model)
  _make_byte_level(backend, config)
  return backend


def _make_byte_level(
  backend: tokenizers.Tokenizer, config: dict[str, Any]
) -> None:
  backend.normalizer = None
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=bool(config.get('add_prefix_space'))
  )
  backend.decoder = decoders.ByteLevel()


def _token(value: Any, **more: Any) -> tokenizers.AddedToken:
  """Makes a token of its JSON: a string, or an object of its properties."""
  if isinstance(value, str):
    return tokenizers.AddedToken(value, **more)
  try:
    fields = {n: v for n, v in value.items() if n not in ('__type', 'id')}
    return tokenizers.AddedToken(**fields | more)
  except (AttributeError, TypeError):
    raise InputError(f'{value!r} describes no special token') from None


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the named special tokens: bos, eos, ..."""
  values = {n: config.get(f'{n}_token') for n in _NAMES}
  return {n: _token(v, special=True) for n, v in values.items() if v}


def _added_tokens(
  backend: tokenizers.Tokenizer,
  config: dict[str, Any],
  names: dict[str, Any],
) -> list[tokenizers.AddedToken]:
  """Returns what the backend does not know yet, in the order of ids."""
  known = {repr(t) for t in backend.get_added_tokens_decoder().values()}
  taken = {str(t) for t in backend.get_added_tokens_decoder().values()}
  listed = config.get('added_tokens_decoder') or {}
  named = {str(t) for t in names.values()}
  out = []
  for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
    token = _token(fields)
    token.special = token.special or str(token) in named
    if repr(token) not in known:
      out.append(token)
    taken.add(str(token))
  extra = config.get('extra_special_tokens')
  extra = extra or config.get('additional_special_tokens') or []
  extra = extra.values() if isinstance(extra, dict) else extra
  for token in (*names.values(), *(_token(t, special=True) for t in extra)):
    if str(token) not in taken:
      out.append(token)
      taken.add(str(token))
  return out
