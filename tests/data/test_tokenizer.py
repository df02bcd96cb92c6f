"""Ids and texts against transformers.AutoTokenizer."""

import json
import random

import pytest
import tokenizers
import transformers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from flexjax.data.tokenizer import Tokenizer
from flexjax.errors import InputError
from flexjax.runtime.sources import BUNDLED

CORPUS = [
  'The quick brown fox jumps over the lazy dog, 1234 times.',
  'Grüße aus München — naïve café, coöperate; ΑΒΓ абв',
  'def f(x):\n\treturn x ** 2  # squared\n\n\n',
  "It's what we'd say; they'll 've gone.  Two  spaces   three.",
  '東京と京都 こんにちは 你好，世界 한국어 🙂👩‍👩‍👧🏽',
] * 20
HARD = {
  'empty': '',
  'space': ' ',
  'spaces': '   leading and trailing   ',
  'tabs and newlines': '\ta\n\n b\r\n\x0bc\x0c \n',
  'NUL': 'a\0b\0\0',
  'control': ''.join(map(chr, range(32))) + '\x7f\x80\x9f\u200b\u2028\ufeff',
  'emoji': '👩‍👩‍👧🏽🇩🇪 ✌️ 🙂🙂',
  'combining': 'e\u0301 vs é, a\u0308\u0323, Z̷̢͎a̴l̵g̶o',
  'CJK': '東京と京都へ行く。你好世界 한국어',
  'right to left': 'שלום עולם مرحبا',
  'contractions': "it's I'LL we'd 've 's '",
  'numbers': '1234567890 3.14 ½ ²³ ١٢٣',
  'eos inside': 'a</s>b </s> c</s></s>',
  'pad inside': 'x<pad>y <pad> <unk> <s> <mask> <|endoftext|>',
  'nearly special': '< /s> </s < pad> <pad </S>',
  'galactica': '[START_REF]A, B[END_REF] <work> 12+34 </work>',
  'long word': 'a' * 5000 + 'Antidisestablishment' * 50,
  'long spaces': ' ' * 3000,
  'beyond the plane': '𝔘𝔫𝔦 \U0010ffff \ue000',
  'byte level letters': 'Ġ Ċ Ā Ń',
}


def train(*, pre=None, normalizer=None, special=('<s>', '<pad>', '</s>')):
  """Returns a small byte-level BPE tokenizer."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.normalizer = normalizer
  backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=[*special, '<unk>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(CORPUS, trainer)
  return backend


def added(content):
  """A token as facebook's tokenizer_config.json writes it."""
  return {
    '__type': 'AddedToken',
    'content': content,
    'lstrip': False,
    'normalized': True,
    'rstrip': False,
    'single_word': False,
  }


OPT = {
  'errors': 'replace',
  'unk_token': added('</s>'),
  'bos_token': added('</s>'),
  'eos_token': added('</s>'),
  'pad_token': added('<pad>'),
  'add_prefix_space': False,
  'add_bos_token': True,
  'special_tokens_map_file': None,
  'name_or_path': 'opt-30b',
  'tokenizer_class': 'GPT2Tokenizer',
}
LISTED = {
  'added_tokens_decoder': {
    '1': {'content': '<pad>', 'normalized': True, 'special': True},
    '2': {'content': '</s>', 'normalized': True, 'special': True},
    '600': {'content': '<extra>', 'lstrip': True, 'special': False},
    '601': {'content': '<more>', 'rstrip': True, 'special': True},
  }
}
EXTRAS = ('x <extra> y', 'x <more> y', 'a<new>b')


def write(path, config, backend=None, **files):
  """Writes a directory; `backend` goes into vocab.json and merges.txt."""
  (path / 'config.json').write_text('{"model_type": "opt"}')
  if config is not None:
    files['tokenizer_config'] = config
  for name, fields in files.items():
    (path / f'{name}.json').write_text(json.dumps(fields))
  if backend is not None:
    backend.model.save(str(path))
  return path


def assert_same(path):
  """Compares encoding, decoding and ids on hard texts."""
  ours = Tokenizer.open(path)
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  for text in (*HARD.values(), *EXTRAS):
    ids = ours.encode(text)
    assert ids == theirs(text)['input_ids'], text
    own = theirs(text, add_special_tokens=False)['input_ids']
    assert ours.encode(text, leading=False) == own, text
    assert ours.encode('') + own == ids, text
    decoded = theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == decoded, text
    for cut in range(1, min(len(ids), 20)):  # within characters, too
      decoded = theirs.decode(ids[:cut], skip_special_tokens=True)
      assert ours.decode(ids[:cut]) == decoded
  ids = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
  assert [ours.bos_id, ours.eos_id, ours.pad_id] == ids
  assert ours.vocab_size == len(theirs)
  return ours


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'add_bos_token': False},
    {'add_prefix_space': True},
    {'bos_token': '<s>', 'pad_token': '<new>'},
    {'additional_special_tokens': ['<new>', '<mask>']},
    {'extra_special_tokens': ['<new>']},
    {'split_special_tokens': True},
    {'clean_up_tokenization_spaces': True},
    LISTED,
  ],
  ids=str,
)
def test_vocab_and_merges(tmp_path, changes):
  ours = assert_same(write(tmp_path, OPT | changes, train()))
  bos = [] if changes.get('add_bos_token') is False else [ours.bos_id]
  assert ours.encode('')[:1] == bos


def test_opt_starts_with_its_end_token(tmp_path):
  ours = Tokenizer.open(write(tmp_path, OPT, train()))
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 2, 1)
  assert ours.encode('')[:] == [2]
  assert ours.encode('a</s>b')[0::2] == [2, 2]
  assert ours.decode(ours.encode('a</s>b')) == 'ab'


@pytest.mark.parametrize('text', HARD.values(), ids=HARD)
def test_texts_survive(tmp_path, text):
  ours = Tokenizer.open(write(tmp_path, OPT, train()))
  plain = text.replace('</s>', '').replace('<pad>', '')
  assert ours.decode(ours.encode(plain)) == plain


def test_older_files(tmp_path):
  config = {n: v for n, v in OPT.items() if not n.endswith('s_token')}
  files = {
    'special_tokens_map': {'bos_token': '</s>', 'eos_token': added('</s>')},
    'added_tokens': {'<extra>': 600, '<more>': 601},
  }
  assert_same(write(tmp_path, config, train(), **files))


def test_without_configuration_it_is_opt(tmp_path):
  ours = Tokenizer.open(write(tmp_path, None, train()))
  (tmp_path / 'a').mkdir()
  said = Tokenizer.open(write(tmp_path / 'a', OPT, train()))
  for text in HARD.values():
    assert ours.encode(text) == said.encode(text)
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 2, 1)


def galactica():
  """Digits apart, citations kept, NFC: no plain GPT-2 pre-tokenizer."""
  pre = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        tokenizers.Regex(r'\[(START|END)_REF\]'), 'isolated'
      ),
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.Punctuation(),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend = train(pre=pre, normalizer=normalizers.NFC())
  backend.add_special_tokens(['[START_REF]', '[END_REF]', '<work>'])
  backend.enable_truncation(8)
  backend.enable_padding(pad_id=1, pad_token='<pad>', length=12)
  return backend


@pytest.mark.parametrize(
  'config',
  [
    {'tokenizer_class': 'PreTrainedTokenizerFast'},
    {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>'},
    {'tokenizer_class': 'TokenizersBackend', 'eos_token': '</s>'} | LISTED,
  ],
  ids=str,
)
def test_tokenizer_json_of_galactica(tmp_path, config):
  write(tmp_path, {**config, 'pad_token': '<pad>'})
  galactica().save(str(tmp_path / 'tokenizer.json'))
  ours = assert_same(tmp_path)
  assert ours.encode('') == []
  assert len(ours.encode('no truncation ' * 20)) > 60


@pytest.mark.parametrize(
  'changes',
  [{}, {'tokenizer_class': 'GPT2TokenizerFast'}, {'add_prefix_space': True}],
  ids=str,
)
@pytest.mark.parametrize('processor', ['none', 'byte level', 'bos'])
def test_tokenizer_json_of_opt(tmp_path, changes, processor):
  backend = train()
  if processor == 'byte level':
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
  if processor == 'bos':
    backend.post_processor = processors.TemplateProcessing(
      single='</s> $A', special_tokens=[('</s>', 2)]
    )
  write(tmp_path, OPT | changes)
  backend.save(str(tmp_path / 'tokenizer.json'))
  assert_same(tmp_path)


def test_tokenizer_json_alone(tmp_path):
  write(tmp_path, None)
  train().save(str(tmp_path / 'tokenizer.json'))
  ours = Tokenizer.open(tmp_path)
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / 'tokenizer.json')
  )
  for text in HARD.values():
    assert ours.encode(text) == theirs(text)['input_ids']
  assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, None, None)


def test_saved_by_transformers(tmp_path):
  write(tmp_path, OPT, train())
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  (tmp_path / 'again').mkdir()
  theirs.save_pretrained(write(tmp_path / 'again', None))
  ours = assert_same(tmp_path / 'again')
  assert ours.encode('')[:] == [2]


@pytest.mark.parametrize('text', ['\ud800', 'ab\udfffc', '\udc80' * 3])
def test_lone_surrogates(tmp_path, text):
  ours = Tokenizer.open(write(tmp_path, OPT, train()))
  with pytest.raises(InputError, match='lone surrogate at character'):
    ours.encode(text)


def test_ids_beyond_the_vocabulary(tmp_path):
  ours = Tokenizer.open(write(tmp_path, OPT, train()))
  ids = ours.encode('a b')
  assert ours.decode([*ids, 50000]) == 'a b'
  assert ours.decode([]) == ''


def test_missing_files(tmp_path):
  with pytest.raises(InputError, match=r'holds no tokenizer.*vocab\.json is'):
    Tokenizer.open(tmp_path)
  write(tmp_path, OPT, train())
  (tmp_path / 'merges.txt').unlink()
  with pytest.raises(InputError, match=r'merges\.txt is missing'):
    Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('vocab.json', '{'),
    ('vocab.json', '{"a": "b"}'),
    ('merges.txt', '#version: 0.2\nnot there\n'),
    ('tokenizer_config.json', '['),
    ('tokenizer_config.json', '[]'),
    ('tokenizer.json', '{}'),
    ('tokenizer.json', '{"version": "1.0"'),
    ('special_tokens_map.json', '3'),
  ],
)
def test_malformed_files(tmp_path, name, text):
  write(tmp_path, OPT, train())
  (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=name):
    Tokenizer.open(tmp_path)


def test_pieces_of_random_ids():
  tokenizer = Tokenizer.open(BUNDLED)
  rng = random.Random(0)
  for _ in range(200):
    # The first ids are single bytes, most of which are parts of characters.
    ids = rng.choices(range(600), k=12)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert ''.join(pieces) == tokenizer.decode(ids)
