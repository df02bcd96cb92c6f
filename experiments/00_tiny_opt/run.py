"""Trains the small OPT that ships with flexjax, on Python's own library.

Question, command, cost and result are in README.md beside this file.
"""

import csv
import json
import math
import pathlib
import subprocess
import time

import corpus
import export
import jax
import jax.numpy as jnp
import numpy as np
import training
from absl import app, flags, logging

from flexjax.config import ModelConfig
from flexjax.models import opt

HERE = pathlib.Path(__file__).parent
PROMPTS = (
  'def ',
  'import ',
  'class ',
  'from ',
  'import os\nimport ',
  'def __init__(self, ',
  'for i in range(',
  'with open(',
  '    """Return ',
  'if __name__ == ',
  'class TestList(unittest.TestCase):\n    def ',
  'def add(a, b):\n    return ',
)

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum(
  'stage', ['corpus', 'train'], ['corpus', 'train', 'check'], 'What to do.'
)
flags.DEFINE_string('work_dir', '.tiny', 'Tokens and tokenizer go here.')
flags.DEFINE_string('output_dir', 'flexjax/models/tiny_opt', 'Checkpoint.')
flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'The table of evaluations.'
)
flags.DEFINE_integer('vocab_size', 4096, 'Tokens, special ones included.')
flags.DEFINE_integer('hidden', 192, 'Model dimension.')
flags.DEFINE_integer('heads', 3, 'Attention heads.')
flags.DEFINE_integer('layers', 6, 'Decoder layers.')
flags.DEFINE_integer('ffn', 768, 'Feed-forward dimension.')
flags.DEFINE_integer('positions', 1024, 'Longest context, tokens.')
flags.DEFINE_integer('batch_size', 64, 'Windows in a step.')
flags.DEFINE_integer('steps', 8000, 'Optimisation steps, at most.')
flags.DEFINE_float(
  'max_seconds', 0, 'Shorten the cosine to end by then; 0: no limit.'
)
flags.DEFINE_integer('warmup', 300, 'Steps of linear warm-up.')
flags.DEFINE_float('learning_rate', 3e-3, 'Peak of the schedule.')
flags.DEFINE_float('weight_decay', 0.1, 'Of matrices, times the rate.')
flags.DEFINE_float('dropout', 0.1, 'After the embedding and each sub-layer.')
flags.DEFINE_integer('chunk', 50, 'Steps in one dispatch.')
flags.DEFINE_integer('eval_every', 250, 'Steps between evaluations.')
flags.DEFINE_integer('eval_batch', 16, 'Chunks evaluated together.')
flags.DEFINE_integer('eval_chunks', 0, 'Held-out chunks; 0: all of them.')
flags.DEFINE_enum(
  'compute', None, ['float32', 'bfloat16'], 'Default: by the backend.'
)
flags.DEFINE_integer('seed', 0, 'Of weights, windows and dropout.')
flags.DEFINE_string('commit', None, 'For results.csv; default: git says.')


def main(argv):
  del argv
  begun = time.monotonic()
  work = pathlib.Path(FLAGS.work_dir)
  output = pathlib.Path(FLAGS.output_dir)
  if 'corpus' in FLAGS.stage:
    corpus.write(work, FLAGS.vocab_size)
  if 'train' in FLAGS.stage:
    train(work, output, begun)
  if 'check' in FLAGS.stage:
    check(work, output)


def train(work: pathlib.Path, output: pathlib.Path, begun: float) -> None:
  """Trains, keeps the best held-out weights, writes checkpoint and results."""
  about = json.loads((work / 'corpus.json').read_text())
  tokenizer = corpus.load_tokenizer(work)
  config = ModelConfig(
    num_layers=FLAGS.layers,
    num_heads=FLAGS.heads,
    hidden_size=FLAGS.hidden,
    ffn_size=FLAGS.ffn,
    embed_size=FLAGS.hidden,
    vocab_size=tokenizer.get_vocab_size(),
    max_positions=FLAGS.positions,
  )
  on_cpu = jax.default_backend() == 'cpu'
  recipe = training.Recipe(
    compute=FLAGS.compute or ('float32' if on_cpu else 'bfloat16'),
    begun=begun,
    **{
      name: FLAGS[name].value
      for name in (
        'batch_size', 'steps', 'max_seconds', 'warmup', 'learning_rate',
        'weight_decay', 'dropout', 'chunk', 'eval_every', 'seed',
      )
    },
  )  # fmt: skip
  data = load(work, config, tokenizer)
  told = {k: v for k, v in vars(recipe).items() if k != 'begun'}
  logging.info('%s %s', config, told)
  results = pathlib.Path(FLAGS.results)
  results.parent.mkdir(parents=True, exist_ok=True)
  output.mkdir(parents=True, exist_ok=True)
  best, kept = math.inf, None
  with results.open('w', newline='') as f:
    table = csv.writer(f)
    table.writerow([*training.Row._fields, 'device', 'commit', 'recipe'])
    where = [jax.devices()[0].device_kind, commit(), json.dumps(told)]
    for row, weights in training.train(config, recipe, data):
      table.writerow([round(v, 6) for v in row] + where)
      f.flush()
      logging.info(
        'step %d  train %.4f  seen %.4f  held out %.4f (%.2f)  %.0f s',
        *(row[:5]), row.seconds,
      )  # fmt: skip
      if row.held_out_loss < best:  # Written at once: no run is lost.
        best, kept = row.held_out_loss, row
        export.write(output, config, jax.device_get(weights), work)
  if kept is None:
    raise RuntimeError('no evaluation gave a finite loss')
  print(f'kept step {kept.step} of {row.step}: held-out loss {best:.4f}')
  bits = best * about['held_out']['tokens'] / about['held_out']['bytes']
  print(f'{bits / math.log(2):.4f} bits per byte')
  stored = jax.device_put(tuple(export.read(output, config)))
  evaluate = training.evaluator(config, 'float32', training.attend)
  with jax.default_matmul_precision('highest'):
    value = float(evaluate(stored, data.held_out))
  print(f'as stored in float16, computed in float32: {value:.4f}')
  show(config, stored, tokenizer)


def load(work: pathlib.Path, config: ModelConfig, tokenizer) -> training.Data:
  """Puts both streams on the device."""
  stream = np.load(work / 'train.npy')
  held_out = chunked(np.load(work / 'held_out.npy'), config)
  spelled = [tokenizer.id_to_token(n) for n in range(config.vocab_size)]
  seen = training.chunks(
    stream,
    FLAGS.eval_batch,
    config.max_positions,
    held_out.size // config.max_positions,
  )
  starts = corpus.window_starts(stream, spelled)
  return jax.device_put(training.Data(stream, starts, held_out, seen))


def chunked(stream: np.ndarray, config: ModelConfig) -> np.ndarray:
  return training.chunks(
    stream, FLAGS.eval_batch, config.max_positions, FLAGS.eval_chunks
  )


def show(config: ModelConfig, weights: tuple, tokenizer) -> None:
  """Prints what the model makes of a few prompts."""
  prompts = [
    [corpus.BOS_ID, *tokenizer.encode(prompt).ids] for prompt in PROMPTS
  ]
  for temperature in (0.0, 0.7):
    print(f'=== temperature {temperature}')
    out = training.complete(config, weights, prompts, 40, temperature, 0)
    for ids in out:
      ids = ids[1:]
      end = ids.index(corpus.BOS_ID) if corpus.BOS_ID in ids else len(ids)
      print(tokenizer.decode(ids[:end]), '\n---')


def check(work: pathlib.Path, output: pathlib.Path) -> None:
  """Compares held-out loss by training, flexjax's layers and transformers."""
  config = export.config_of(output)
  weights = jax.device_put(tuple(export.read(output, config)))
  batches = chunked(np.load(work / 'held_out.npy'), config)
  evaluate = training.evaluator(config, 'float32', training.attend)
  ours = float(evaluate(weights, batches))
  size = sum(path.stat().st_size for path in output.iterdir())
  print(f'{output}: {size} bytes')
  print(f'training forward  {ours:.5f} on {(batches >= 0).sum()} tokens')
  plain = layer_by_layer(config, weights, batches)
  print(f'flexjax layers    {plain:.5f}')
  theirs = by_transformers(output, batches)
  print(f'transformers      {theirs:.5f}')
  if max(abs(plain - ours), abs(theirs - ours)) > 1e-3:
    raise RuntimeError('the losses differ')


def layer_by_layer(config, weights, batches) -> float:
  """Mean loss through the modules exactly as inference applies them."""

  @jax.jit
  def one(weights, labels):
    x = training.with_bos(labels)
    start = jnp.zeros(labels.shape[0], jnp.int32)
    for layer in opt.layers(config, jnp.float32):
      w = {k: a for g in layer.groups for k, a in weights[g].items()}
      if layer.kind == 'head':
        x = layer.module.apply({'params': w}, x, method='logits')
      else:
        x, _ = layer.module.apply({'params': w}, x, None, start, 0)
    return training.losses(x, labels)

  total, count = np.sum([one(weights, b) for b in batches], axis=0)
  return float(total / count)


def by_transformers(output: pathlib.Path, batches: np.ndarray) -> float:
  """Mean loss through transformers; checks its tokenizer on the way."""
  import torch
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(output)
  ours = corpus.load_tokenizer(output)
  for prompt in PROMPTS:
    expected = [corpus.BOS_ID, *ours.encode(prompt).ids]
    if (ids := tokenizer(prompt)['input_ids']) != expected:
      raise RuntimeError(f'{prompt!r} becomes {ids}, not {expected}')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    output, dtype=torch.float32
  )
  total, count = 0.0, 0
  with torch.no_grad():
    for labels in batches:
      inputs = np.asarray(training.with_bos(jnp.asarray(labels)))
      y = model(input_ids=torch.tensor(inputs).long()).logits
      total += torch.nn.functional.cross_entropy(
        y.flatten(0, 1),
        torch.tensor(labels).long().flatten(),
        ignore_index=-1,
        reduction='sum',
      ).item()
      count += (labels >= 0).sum()
  return total / count


def commit() -> str:
  """Returns the commit, by flag or by git, or '' where neither says."""
  if FLAGS.commit is not None:
    return FLAGS.commit
  try:
    return subprocess.check_output(
      ['git', 'rev-parse', '--short', 'HEAD'], text=True, cwd=HERE
    ).strip()
  except (OSError, subprocess.CalledProcessError):
    return ''


if __name__ == '__main__':
  app.run(main)
