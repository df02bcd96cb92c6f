"""Tasks of lm-evaluation-harness; whoever imports them is skipped without."""

import json
import warnings
from pathlib import Path

import pytest

with (
  warnings.catch_warnings(),  # what it imports is not ours to mend
  pytest.MonkeyPatch.context() as patch,
):
  warnings.simplefilter('ignore')
  for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):  # read at import
    patch.setenv(name, '1')
  lm_eval = pytest.importorskip('lm_eval')
  from lm_eval.tasks import TaskManager

  import flexjax.apps.lm_eval  # noqa: F401  registers the model

from flexjax.runtime import llm
from flexjax.runtime.sources import BUNDLED

CODE = Path(llm.__file__).read_text()
FUNCTIONS = [
  f'def {part}' for part in CODE.split('  def ')[1:] if len(part) > 300
]
TASKS = {
  'choice': (
    {
      'output_type': 'multiple_choice',
      'doc_to_text': '{{question}}',
      'doc_to_choice': '{{choices}}',
      'doc_to_target': '{{answer}}',
      'target_delimiter': '',
      'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
    },
    [
      {'question': head, 'choices': [':', '(', ' not', ' = 1'], 'answer': 0}
      for head in ('if x', 'for i in x', 'class A', 'while True')
    ]
    # One token each, which one row could answer together.
    + [{'question': 'import', 'choices': [' sys', ' os'], 'answer': 1}]
    + [{'question': 'if x is', 'choices': [' None', ' not None'], 'answer': 0}]
    + [
      {
        'question': text[:cut],
        'choices': [text[cut : cut + 40], 'pass\n'],
        'answer': 0,
      }
      for text in FUNCTIONS[:12]
      for cut in [text.index(' ', 150)]  # where a word begins
    ],
  ),
  'rolling': (
    {
      'output_type': 'loglikelihood_rolling',
      'doc_to_text': '',
      'doc_to_target': '{{text}}',
      'metric_list': [{'metric': 'bits_per_byte'}],
    },
    # The last is longer than the context. Not much longer: what both models
    # round in float32 adds up over tokens.
    [{'text': text} for text in ('x = 1\n', *FUNCTIONS[:3], CODE[:4500])],
  ),
  'words': (
    {
      'output_type': 'loglikelihood',
      'doc_to_text': '{{text}}',
      'doc_to_target': '{{word}}',
      'metric_list': [{'metric': 'acc'}, {'metric': 'perplexity'}],
    },
    [
      {'text': text, 'word': word}
      for text, word in (
        ('if x is not', ' None:'),
        ('import', ' unittest'),
        ('import', ' sys'),
        ('for i', ' in range'),
        ('return', ' self'),
      )
    ],
  ),
  'continued': (
    {
      'output_type': 'generate_until',
      'doc_to_text': '{{prompt}}',
      'doc_to_target': '{{answer}}',
      'generation_kwargs': {
        'until': ['\n\n', ':'],
        'max_gen_toks': 24,
        'do_sample': False,
      },
      'metric_list': [{'metric': 'exact_match'}],
    },
    [
      {'prompt': text[:cut], 'answer': 'self'}
      for text, cut in zip(FUNCTIONS, range(4, 400, 40), strict=False)
    ]
    + [{'prompt': 'def f(', 'answer': 'x)'}],
  ),
}


def write(folder):
  """Writes the tasks and their data; no network is needed for them."""
  for name, (task, rows) in TASKS.items():
    data = folder / f'{name}.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    task = task | {
      'task': f'local_{name}',
      'dataset_path': 'json',
      'dataset_kwargs': {
        'data_files': {'test': str(data)},
        'cache_dir': str(folder / 'cache'),
      },
      'test_split': 'test',
    }
    # JSON is YAML.
    (folder / f'{name}.yaml').write_text(json.dumps(task))


def evaluate(tasks, model, options, names=tuple(TASKS)):
  return lm_eval.simple_evaluate(
    model=model,
    model_args={'pretrained': str(BUNDLED), 'dtype': 'float32', **options},
    tasks=[f'local_{name}' for name in names],
    task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    bootstrap_iters=0,
  )


def close(mine, theirs):
  # Its sums are in 32 bits: those of thousands of nats are no more exact.
  assert mine == pytest.approx(theirs, abs=1e-3, rel=3e-7)
