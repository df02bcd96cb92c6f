"""flexjax eval: its figures, and what it refuses."""

import json
import math

import pytest
import torch
import transformers
from conftest import logits_of

from flexjax.runtime.sources import BUNDLED
from tests.commands import NO_WEIGHTS, STATS, jsonl, refuses, snapshot, write

TEXT = 'import os\r\n\r\n\r\ndef f(a, b):\n  return a + b  # é\n' * 8
LAST_WORDS = [
  'for i in range(10):\n  for j in',
  'if x is not\n  None',
  'import os\nimport sys\nimport os\nimport sys\n',
  'def f(self): return self.zebra',
]
PLACED = {
  'device': [],
  'host and disk': ['--weights=0,50,50', '--disk_dir={}/disk'],
  'disk, row': [
    '--weights=0,0,100',
    '--hidden=0,0,100',
    '--schedule=row',
    '--disk_dir={}/disk',
    '--batch_size=2',
    '--num_batches=2',
  ],
}


@pytest.fixture(scope='session')
def bundled():
  """The bundled model and its tokenizer as transformers reads them."""
  model = transformers.OPTForCausalLM.from_pretrained(
    BUNDLED, dtype=torch.float32
  )
  return model.eval(), transformers.AutoTokenizer.from_pretrained(BUNDLED)


def evaluate(flexjax, place, text, *argv):
  """Runs eval; returns its figures, which --stats has, too."""
  (place / 'text').write_bytes(text.encode())
  done = flexjax(
    'eval',
    f'--input={place}/text',
    f'--stats={place}/stats.json',
    '--dtype=float32',
    *(a.replace('{}', str(place)) for a in argv),
  )
  assert done.code == 0, done.stderr
  figures = json.loads(done.stdout)
  assert done.stdout == json.dumps(figures) + '\n'
  stats = json.loads((place / 'stats.json').read_text())
  assert set(stats) == {*STATS, 'scored_tokens', 'eval'}
  assert stats['eval'] == figures
  assert f'perplexity  {figures["perplexity"]:.6g}'.split() in [
    line.split() for line in done.stderr.splitlines()
  ]
  return figures


@pytest.mark.parametrize('argv', PLACED.values(), ids=PLACED)
def test_perplexity(flexjax, tmp_path, bundled, argv):
  model, tokenizer = bundled
  ids = tokenizer(TEXT, add_special_tokens=False)['input_ids']
  logprobs = []
  while len(logprobs) < len(ids):  # whole windows are 1 + 47 tokens
    begin = max(0, len(logprobs) - 30)
    row = [2, *ids[begin : begin + 47]]
    p = logits_of(model, row).log_softmax(-1)[range(len(row) - 1), row[1:]]
    logprobs += p[len(logprobs) - begin :].tolist()
  nll = -sum(logprobs) / len(ids)
  argv = [*argv, '--window=48', '--stride=17']
  assert evaluate(flexjax, tmp_path, TEXT, *argv) == {
    'metric': 'perplexity',
    'perplexity': pytest.approx(math.exp(nll), rel=1e-4),
    'nll': pytest.approx(nll, rel=1e-4),
    'tokens': len(ids),
    'bits_per_byte': pytest.approx(
      nll * len(ids) / math.log(2) / len(TEXT.encode()), rel=1e-4
    ),
  }


@pytest.mark.parametrize('argv', PLACED.values(), ids=PLACED)
def test_last_token(flexjax, tmp_path, bundled, argv):
  model, tokenizer = bundled
  right, total = 0, 0.0
  for text in LAST_WORDS:
    context = tokenizer(text.rstrip().rsplit(maxsplit=1)[0])['input_ids']
    ids = tokenizer(text.rstrip())['input_ids']
    assert ids[: len(context)] == context
    logits = logits_of(model, ids)[len(context) - 1 : -1]
    word = torch.tensor(ids[len(context) :])
    right += bool((logits.argmax(-1) == word).all())
    total += float(logits.log_softmax(-1)[range(len(word)), word].sum())
  assert 0 < right < len(LAST_WORDS)
  rows = [json.dumps({'text': t, 'source': 'x'}) + '\n' for t in LAST_WORDS]
  text = '\n'.join(rows)
  argv = [*argv, '--metric=last_token']
  assert evaluate(flexjax, tmp_path, text, *argv) == {
    'metric': 'last_token',
    'accuracy': right / len(LAST_WORDS),
    'perplexity': pytest.approx(math.exp(-total / len(LAST_WORDS)), rel=1e-4),
    'examples': len(LAST_WORDS),
  }


def test_perplexity_without_a_leading_token(flexjax, place):
  """Then the first token has nothing before it, and does not count."""
  config = {'tokenizer_class': 'GPT2Tokenizer'}
  (place / 'one/tokenizer_config.json').write_text(json.dumps(config))
  model = transformers.OPTForCausalLM.from_pretrained(place / 'one').eval()
  text = 'thisisatext' * 3
  ids = json.loads((place / 'one/vocab.json').read_text())
  row = [ids[c] for c in text]
  p = logits_of(model, row).log_softmax(-1)[range(len(row) - 1), row[1:]]
  figures = evaluate(flexjax, place, text, '--model={}/one')
  assert figures['tokens'] == len(text) - 1
  assert figures['nll'] == pytest.approx(-float(p.mean()), rel=1e-4)
  (place / 'text').write_text('a')
  argv = ['eval', f'--model={place}/one', f'--input={place}/text']
  refuses(flexjax(*argv), r'2 tokens.*got 1')
  argv += ['--window=9', '--stride=9']
  refuses(flexjax(*argv), r'stride.*1 and 8.*got 9')


LINES = ['--metric=last_token', '--input={}/in.jsonl']
# name: (what is changed, flags, what the line says)
NOT_EVALUATED = {
  'no input': (None, ['--input='], r'--input'),
  'no input file': (None, ['--input={}/none.txt'], r'none\.txt'),
  'input is a directory': (None, ['--input={}/one'], r'/one'),
  'not UTF-8': (write('in.txt', b'ab\xff\xfe'), [], r'in\.txt'),
  'empty': (write('in.txt', ''), [], r'/in\.txt.*is empty'),
  'no such metric': (None, ['--metric=bleu'], r'metric.*perplexity.*bleu'),
  'window 1': (None, ['--window=1'], r'window.*between 2 and 40.*\b1$'),
  'window beyond the context': (None, ['--window=41'], r'window.*40.*41'),
  'window is no number': (None, ['--window=x'], r'window'),
  'stride 0': (None, ['--stride=0'], r'stride.*between 1 and 39.*\b0$'),
  'stride below 0': (None, ['--stride=-1'], r'stride.*-1'),
  'stride of a window': (
    None,
    ['--window=8', '--stride=8'],
    r'stride.*between 1 and 7.*\b8$',
  ),
  'window for words': (None, [*LINES, '--window=8'], r'--window.*perplexity'),
  'stride for words': (None, [*LINES, '--stride=8'], r'--stride.*perplexity'),
  'no lines': (write('in.jsonl', '\n'), LINES, r'in\.jsonl.*no examples'),
  'line is not JSON': (jsonl('{"text": "a b"}', '', '{'), LINES, r'jsonl:3\b'),
  'line is no object': (jsonl('["text"]'), LINES, r'jsonl:1\b.*object'),
  'line without text': (
    jsonl('{"prompt": "a b"}'),
    LINES,
    r"jsonl:1\b.*'text'",
  ),
  'text is no text': (jsonl('{"text": [5, 6]}'), LINES, r"jsonl:1\b.*'text'"),
  'single word': (
    jsonl('{"text": "a b"}', '{"text": " word\\n"}'),
    LINES,
    r'jsonl:2\b.*two words',
  ),
  'words without tokens': (
    jsonl('{"text": "a \u00e9"}'),
    LINES,
    r'jsonl:1\b.*no tokens',
  ),
  'lone surrogate': (
    jsonl(r'{"text": "a \ud800"}'),
    LINES,
    r'jsonl:1\b.*surrogate',
  ),
  'text too long': (
    jsonl('{"text": "a b"}', json.dumps({'text': 'a ' * 39 + 'b'})),
    LINES,
    r'jsonl:2\b.*\b41\b.*\b40\b',
  ),
  'no tokenizer': (
    None,
    ['--model=opt-125m', '--random_weights'],
    r'tokenizer',
  ),
  'stats over input': (None, ['--stats={}/in.txt'], r'overwrite'),
  'stats in no directory': (None, ['--stats={}/no/stats'], r'/no/stats'),
  'flag of generate': (None, ['--temperature=1'], r'temperature'),
}


@pytest.mark.parametrize('case', NOT_EVALUATED.values(), ids=NOT_EVALUATED)
def test_not_evaluated(flexjax, place, case):
  change, flags, expected = case
  (place / 'in.txt').write_text('some text')
  if change is not None:
    change(place)
  before = snapshot(place)
  done = flexjax(
    'eval',
    f'--model={place}/one',
    f'--input={place}/in.txt',
    f'--stats={place}/stats.json',
    f'--disk_dir={place}/disk',
    '--weights=0,50,50',
    *(flag.replace('{}', str(place)) for flag in flags),
    patch=NO_WEIGHTS,
  )
  refuses(done, expected)
  assert snapshot(place) == before
