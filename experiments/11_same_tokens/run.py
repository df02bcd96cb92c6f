"""Are the tokens of a streamed run those of a float32 model on the device?

A random checkpoint of a preset's shape is read in float32, all of it on the
device: the reference. Then it runs in 16 bits, and in 4, with its tensors
elsewhere. A line of results.csv is one placement.

Where tokens differ from the reference's for the first time, rounding explains
it if the reference itself found the two tokens nearly as likely: within twice
what 16 bits change a log-probability by. That is measured where nothing is
streamed and nothing decoded: by scoring the reference's texts. How much of what
is really wrong would pass for rounding, other prompts' tokens show.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

import flexjax
from experiments import common
from flexjax.config import SamplingParams
from flexjax.models import presets

HERE = Path(__file__).parent
_MODELS = flags.DEFINE_list('models', ['opt-125m', 'opt-1.3b'], 'Presets.')
_DTYPES = flags.DEFINE_list('dtypes', ['bfloat16', 'float16'], 'Of 16 bits.')
_FOLDER = flags.DEFINE_string(
  'folder', '/tmp/flexjax_11', 'Folder for checkpoints and the disk tier.'
)
_RESULTS = flags.DEFINE_string(
  'results', str(HERE / 'results.csv'), 'CSV to append to.'
)
_COMMIT = flags.DEFINE_string('commit', '', 'Commit that is measured.')
_HARDWARE = flags.DEFINE_string(
  'hardware', None, "The machine's record, else it is measured."
)

COUNT, NEW_TOKENS = 16, 32
LENGTHS = 40, 129  # of prompts, in tokens: the least, and one beyond the most
BLOCK = {'batch_size': 4, 'num_batches': 4}
DEVICE = {'weights': (100, 0, 0), 'cache': (100, 0, 0), 'hidden': (100, 0, 0)}
PLACEMENTS: dict[str, dict[str, Any]] = {
  'device': DEVICE,
  'host': {
    'weights': (0, 100, 0), 'cache': (0, 100, 0), 'hidden': (0, 100, 0),
    'attention': 'device',
  },
  'disk': {'weights': (0, 0, 100), 'cache': (0, 0, 100), 'hidden': (0, 0, 100)},
  'all three': {
    'weights': (30, 40, 30), 'cache': (30, 40, 30), 'hidden': (30, 40, 30)
  },
  'host, row order': {
    'weights': (0, 100, 0), 'cache': (0, 100, 0), 'schedule': 'row',
    'attention': 'device',
  },
  'host attention': {
    'weights': (0, 100, 0), 'cache': (0, 100, 0), 'attention': 'host'
  },
}  # fmt: skip
COMPARED = (
  'agree', 'differences', 'not_explained', 'right', 'worst_gap', 'rounding',
  'wrong_would_pass',
)  # fmt: skip
PACKED = {'weight_bits': 4, 'cache_bits': 4, 'rounding': 'minmax'}
# Else the model says the same token again and again.
GAIN, SPREAD = 1.5, 0.02


@dataclasses.dataclass(frozen=True)
class Reference:
  """What float32 on the device says of its own tokens.

  Attributes:
    tokens: [prompt, new token].
    logprobs: of these.
  """

  tokens: np.ndarray
  logprobs: np.ndarray


def checkpoint(model: str, dtype: str) -> Path:
  """Writes a random checkpoint, unless it is there, and returns its folder."""
  import torch
  from transformers import OPTConfig, OPTForCausalLM

  folder = Path(_FOLDER.value) / f'{model}-{dtype}'
  if (folder / 'config.json').exists():
    return folder
  sizes = presets.preset(model)
  config = OPTConfig(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.hidden_size,
    word_embed_proj_dim=sizes.embed_size,
    ffn_dim=sizes.ffn_size,
    num_hidden_layers=sizes.num_layers,
    num_attention_heads=sizes.num_heads,
    max_position_embeddings=sizes.max_positions,
  )
  torch.manual_seed(0)
  net = OPTForCausalLM(config)
  with torch.no_grad():
    for name, x in net.named_parameters():
      if x.ndim == 2 and '.layers.' in name:
        torch.nn.init.normal_(x, std=GAIN * x.shape[1] ** -0.5)
      elif x.ndim == 1:
        x += SPREAD * torch.randn_like(x)
  net.to(getattr(torch, dtype)).save_pretrained(folder)
  return folder


def prompts(vocabulary: int) -> list[list[int]]:
  """Ragged prompts of random tokens."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(*LENGTHS, COUNT)
  return [rng.integers(4, vocabulary, n).tolist() for n in sizes]


def load(model: Path, **options: Any) -> flexjax.LLM:
  return flexjax.load(model, hardware=_HARDWARE.value, **BLOCK, **options)


def generate(
  model: Path, asked: Sequence[list[int]], **options: Any
) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns the greedy tokens and the run's stats."""
  params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
  with load(model, **options) as llm:
    out = llm.generate(asked, params)
    return np.array([o.token_ids for o in out]), llm.stats.to_json()


def score(
  model: Path, texts: Sequence[list[int]], last: int, **options: Any
) -> np.ndarray:
  """Returns the log-probabilities [text, last] of the last tokens, on the
  device."""
  with load(model, **DEVICE, **options) as llm:
    return np.array([s.logprobs[-last:] for s in llm.score(texts)])


def refer(model: Path, asked: Sequence[list[int]]) -> Reference:
  """Runs the reference, and scores what it says."""
  tokens, _ = generate(model, asked, dtype='float32', **DEVICE)
  texts = join(asked, tokens)
  return Reference(tokens, score(model, texts, NEW_TOKENS, dtype='float32'))


def join(asked: Sequence[list[int]], tokens: np.ndarray) -> list[list[int]]:
  return [a + t.tolist() for a, t in zip(asked, tokens, strict=True)]


def differences(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, int]]:
  """Yields (prompt, place) of each prompt's first difference."""
  for n, same in enumerate(a == b):
    if not same.all():
      yield n, int(same.argmin())


def gaps(
  model: Path,
  asked: Sequence[list[int]],
  reference: Reference,
  tokens: np.ndarray,
) -> np.ndarray:
  """Returns by how much the reference prefers its own token, at each first
  difference."""
  places = list(differences(reference.tokens, tokens))
  if not places:
    return np.zeros(0)
  texts = [
    asked[n] + reference.tokens[n, :at].tolist() + [int(tokens[n, at])]
    for n, at in places
  ]
  theirs = score(model, texts, 1, dtype='float32')[:, 0]
  return np.array([reference.logprobs[at] for at in places]) - theirs


def seen(reference: np.ndarray, tokens: np.ndarray) -> int:
  """Returns how many tokens agree before each prompt's first difference."""
  ends = dict(differences(reference, tokens))
  return sum(ends.get(n, tokens.shape[1]) for n in range(len(tokens)))


def judge(
  model: Path, asked: Sequence[list[int]], reference: Reference, dtype: str
) -> Callable[[np.ndarray], dict[str, Any]]:
  """Returns what compares tokens of a run in 16 bits with the reference's."""
  texts = join(asked, reference.tokens)
  halves = score(model, texts, NEW_TOKENS, dtype=dtype)
  rounding = float(np.abs(halves - reference.logprobs).max())
  others = gaps(model, asked, reference, np.roll(reference.tokens, 1, axis=0))

  def compared(tokens: np.ndarray) -> dict[str, Any]:
    found = gaps(model, asked, reference, tokens)
    agree = seen(reference.tokens, tokens)
    wrong = int((found > 2 * rounding).sum())
    return {
      'agree': agree,
      'differences': len(found),
      'not_explained': wrong,
      'right': round(agree / (agree + wrong), 4),
      'worst_gap': round(float(found.max(initial=0)), 5),
      'rounding': round(rounding, 5),
      'wrong_would_pass': round(float((others <= 2 * rounding).mean()), 3),
    }

  return compared


def unjudged(tokens: np.ndarray) -> dict[str, Any]:
  del tokens
  return dict.fromkeys(COMPARED, '')


def place(
  model: Path,
  asked: Sequence[list[int]],
  head: dict[str, Any],
  compared: Callable[[np.ndarray], dict[str, Any]],
  **options: Any,
) -> None:
  """Runs a model wherever its tensors may be, a row for each placement."""
  near, home = None, {}
  for name, policy in PLACEMENTS.items():
    if 'cache_bits' in options and policy.get('attention') == 'host':
      continue  # What a CPU attends to is not packed.
    folder = f'{model}-disk-{options.get("weight_bits", 16)}'
    tokens, stats = generate(model, asked, disk_dir=folder, **policy, **options)
    if near is None:
      near, home = tokens, compared(tokens)
    found = home if (tokens == near).all() else compared(tokens)
    fields = {
      'placement': name,
      'tokens': tokens.size,
      'distinct': len(np.unique(tokens)),
      'unlike_device': int((tokens != near).sum()),
      'moved_mb': round(sum(stats['link_bytes'].values()) / 1e6),
    }
    common.append(_RESULTS.value, {**head, **fields, **found})


def main(argv: Sequence[str]) -> None:
  del argv
  for name, dtype in itertools.product(_MODELS.value, _DTYPES.value):
    model = checkpoint(name, dtype)
    asked = prompts(presets.preset(name).vocab_size)
    head = {
      'model': name,
      'commit': _COMMIT.value,
      'machine': f'{jax.devices()[0].device_kind}, jax {jax.__version__}',
      'dtype': dtype,
    }
    # Else an accelerator rounds float32 products to fewer bits.
    with jax.default_matmul_precision('highest'):
      compared = judge(model, asked, refer(model, asked), dtype)
      place(model, asked, {**head, 'bits': 16}, compared, dtype=dtype)
      # In 4 bits there is no reference but the same on the device.
      packed = {**PACKED, 'dtype': dtype}
      place(model, asked, {**head, 'bits': 4}, unjudged, **packed)


if __name__ == '__main__':
  app.run(main)
