"""Python's standard library as tokens: documents, split, vocabulary.

It hides from training which files exist, which modules are held out and how
text becomes ids. Everything is decided by file names and contents, so the same
interpreter gives the same bytes on every machine.
"""

import hashlib
import json
import pathlib
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from absl import logging

SPECIAL = ('<s>', '<pad>', '</s>', '<unk>')  # ids 0 to 3, as OPT has them
BOS_ID = 2  # OPT begins every document with </s>
HELD_OUT_PERCENT = 4  # of module names; their sizes decide the share of bytes
# Tables, generated text, other people's packages, deliberate syntax errors.
LEFT_OUT = re.compile(
  r'(site-packages|encodings|pydoc_data|ensurepip|lib2to3/tests/data)/|'
  r'(^|/)(_sysconfigdata|config-|bad|__phello__)|html/entities'
)
_WORD = re.compile(r'(?<=\s)(?=\S)')
_CUTS = 1 / 50  # 36,000 of them; costs about 0.02 nats at a word
_MIN_CHARS = 200
_SHARED_LINES = 0.5  # more of its lines than this in one other: a duplicate
_LINE_CHARS = 20  # shorter lines say nothing about where text comes from


class Document(NamedTuple):
  """One source file: `name` from the library's root, `module` it belongs to."""

  name: str
  module: str
  text: str


def module_of(name: str) -> str:
  """Returns the module that a file belongs to, its tests and twins included.

  `json/tool.py`, `test/test_json/test_dump.py` and `_json.py` are all `json`;
  `_pydecimal.py` and `test/test_decimal.py` are `decimal`.
  """
  parts = name.removesuffix('.py').split('/')
  stem = parts[1] if parts[0] == 'test' and len(parts) > 1 else parts[0]
  stem = re.sub(r'^_py(?=[a-z])|^_+|tester$', '', stem)
  stem = re.sub(r'^test_+', '', stem)
  return re.match(r'[^_]*?(?=\d*(_|$))', stem)[0] or stem


def is_held_out(module: str) -> bool:
  """Decides by the module's name alone."""
  digest = hashlib.sha256(f'tiny_opt {module}'.encode()).digest()
  return int.from_bytes(digest[:8], 'big') % 100 < HELD_OUT_PERCENT


def read() -> tuple[list[Document], list[Document]]:
  """Reads the running interpreter's library: (training, held-out) documents.

  Held-out documents come first when duplicates are dropped, so that a copy of
  held-out text is not trained on.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  documents = []
  for path in sorted(root.rglob('*.py')):
    name = path.relative_to(root).as_posix()
    if LEFT_OUT.search(name):
      continue
    try:
      with tokenize.open(path) as f:
        text = f.read()
    except (SyntaxError, UnicodeDecodeError):
      continue
    if len(text) >= _MIN_CHARS and '\0' not in text:
      documents.append(Document(name, module_of(name), text))
  documents.sort(key=lambda d: (not is_held_out(d.module), -len(d.text)))
  kept = list(distinct(documents))
  logging.info('%d files, %d after duplicates', len(documents), len(kept))
  training = [d for d in kept if not is_held_out(d.module)]
  return training, [d for d in kept if is_held_out(d.module)]


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
  """Drops a document that shares most of its lines with an earlier one."""
  owners: dict[str, list[int]] = {}
  for n, document in enumerate(documents):
    lines = {
      line
      for raw in document.text.splitlines()
      if len(line := raw.strip()) >= _LINE_CHARS
    }
    shared = Counter(m for line in lines for m in owners.get(line, ()))
    most = max(shared.values(), default=0)
    if lines and most > _SHARED_LINES * len(lines):
      continue
    for line in lines:
      owners.setdefault(line, []).append(n)
    yield document


def train_tokenizer(
  texts: Iterable[str], vocab_size: int
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE with GPT-2's pre-tokenisation and OPT's ids."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = level
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=sorted(level.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Loads `vocab.json` and `merges.txt`; adds no special token by itself."""
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE.from_file(
      str(folder / 'vocab.json'), str(folder / 'merges.txt')
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def encode(
  tokenizer: tokenizers.Tokenizer, documents: Sequence[Document], cuts: float
) -> np.ndarray:
  """Returns one stream of uint16 ids: `</s>` before each document and last.

  A prompt may end in a space (`def `), but GPT-2's pre-tokenisation joins a
  space to the word after it, so plain text never shows a lone space before a
  word. A fraction `cuts` of the words is therefore encoded apart from what
  precedes it, as a prompt and its continuation would be.
  """
  random = np.random.default_rng(0)
  stream = [BOS_ID]
  for document in documents:
    words = [m.start() for m in _WORD.finditer(document.text)]
    at = [
      w
      for w, r in zip(words, random.random(len(words)), strict=True)
      if r < cuts
    ]
    parts = [
      document.text[i:j]
      for i, j in zip([0, *at], [*at, len(document.text)], strict=True)
    ]
    for encoding in tokenizer.encode_batch(parts):
      stream += encoding.ids
    stream.append(BOS_ID)
  return np.asarray(stream, np.uint16)


def window_starts(stream: np.ndarray, vocabulary: Sequence[str]) -> np.ndarray:
  """Returns, for every position of the stream, where its window begins.

  That is the next line in column 0, which is how prompts begin, if there is
  one within 256 tokens; in the middle of long classes it is anywhere.
  """
  # Byte-level BPE spells a line feed Ċ, a space Ġ and a tab ĉ.
  ends_line = np.array([v.endswith('Ċ') for v in vocabulary])
  indents = np.array([v[:1] in ('Ċ', 'Ġ', 'ĉ') for v in vocabulary])
  ends_line[BOS_ID], indents[BOS_ID] = True, True
  here = np.arange(len(stream))
  begins = np.zeros(len(stream), bool)
  begins[1:] = ends_line[stream[:-1]] & ~indents[stream[1:]]
  begin = np.where(begins, here, len(stream))
  following = np.minimum.accumulate(begin[::-1])[::-1]
  return np.where(following - here < 256, following, here).astype(np.int32)


def write(folder: pathlib.Path, vocab_size: int) -> None:
  """Writes the tokenizer, both streams and `corpus.json` into `folder`."""
  training, held_out = read()
  training.sort(key=lambda d: hashlib.sha256(d.name.encode()).digest())
  held_out.sort(key=lambda d: d.name)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = train_tokenizer((d.text for d in training), vocab_size)
  tokenizer.model.save(str(folder))
  about: dict = {'held_out_modules': sorted({d.module for d in held_out})}
  about['held_out_files'] = [d.name for d in held_out]
  splits = (('train', training, _CUTS), ('held_out', held_out, 0.0))
  for name, documents, cuts in splits:
    stream = encode(tokenizer, documents, cuts)
    np.save(folder / f'{name}.npy', stream)
    about[name] = {
      'files': len(documents),
      'bytes': sum(len(d.text.encode()) for d in documents),
      'tokens': len(stream) - len(documents) - 1,
    }
  (folder / 'corpus.json').write_text(json.dumps(about, indent=1) + '\n')
  logging.info('%s', about)
