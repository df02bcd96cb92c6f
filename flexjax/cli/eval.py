"""flexjax eval: how well a model predicts a text.

  flexjax eval --model=DIR --input=wiki.txt
  flexjax eval --model=DIR --input=lambada.jsonl --metric=last_token

perplexity takes a UTF-8 text as it is, whole, in windows that overlap;
last_token takes an object per line with `text`, whose last word is to be
predicted greedily. The figures go to standard output as one line of JSON.
"""

import json
import math
from pathlib import Path

from absl import flags

from flexjax.cli import files, report
from flexjax.cli import flags as shared
from flexjax.errors import InputError
from flexjax.runtime import evaluate

FLAGS = flags.FLAGS
_METRICS = ('perplexity', 'last_token')


def define() -> None:
  shared.define_policy()
  report.define()
  flags.DEFINE_string('input', None, 'File to predict: a text, or JSONL.')
  flags.DEFINE_string(
    'metric',
    'perplexity',
    'perplexity (of every token of a text), or last_token (how often the last '
    'word of a line is right).',
  )
  flags.DEFINE_integer(
    'window',
    None,
    "Tokens that are scored together, for perplexity. Default: the model's "
    'context.',
  )
  flags.DEFINE_integer(
    'stride',
    None,
    'Tokens from one window to the next, for perplexity: each sees at least '
    'window - stride before it. Default: half of the window.',
  )


def run() -> None:
  _check_flags()
  path = Path(FLAGS.input)
  of_words = FLAGS.metric == 'last_token'
  text = '' if of_words else files.read_text(path)
  if not (of_words or text):
    raise InputError(f"--input '{path}' is empty")
  texts = _texts(path) if of_words else []
  shared.check_files('stats', read=('input',))
  with shared.open_model() as llm, report.progress(llm):
    if (tokenizer := llm.tokenizer) is None:
      raise InputError('eval needs a model with a tokenizer')
    limit = llm.config.max_positions
    if of_words:
      examples = []
      for where, line in texts:
        try:
          examples.append(evaluate.last_word(line, tokenizer, limit))
        except InputError as e:
          raise InputError(f'{where}: {e}') from None
    else:
      examples = evaluate.text_windows(
        text, tokenizer, limit, FLAGS.window, FLAGS.stride
      )
    scores = llm.score([example.ids for example in examples])
  if of_words:
    figures = evaluate.last_token(examples, scores)
  else:
    figures = evaluate.perplexity(examples, scores, len(text.encode()))
  # JSON knows no number that is not finite.
  finite = {n: v if math.isfinite(v) else None for n, v in figures.items()}
  named = {'metric': FLAGS.metric, **finite}
  print(json.dumps(named), flush=True)
  report.show(llm, named)


def _check_flags() -> None:
  if FLAGS.metric not in _METRICS:
    raise InputError(
      f"metric must be one of {', '.join(_METRICS)}, got '{FLAGS.metric}'"
    )
  if not FLAGS.input:
    raise InputError('eval needs --input')
  for name in ('window', 'stride'):
    if FLAGS.metric != 'perplexity' and FLAGS[name].value is not None:
      raise InputError(f'--{name} is for --metric=perplexity only')


def _texts(path: Path) -> list[tuple[str, str]]:
  """Reads the texts of a JSONL file, each with its place."""
  texts = []
  for where, line in files.read_lines(path, 'examples'):
    text = files.parse_object(where, line, 'text')['text']
    if not isinstance(text, str):
      raise InputError(f"{where}: 'text' must be text")
    texts.append((where, text))
  return texts
