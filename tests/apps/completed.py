"""Completions of the bundled model, and what transformers makes of them."""

import torch
import transformers

from flexjax.apps.completions import Asked, complete
from flexjax.config import SamplingParams
from flexjax.runtime.sources import BUNDLED

TOLERANCE = 1e-4
PROMPT = 'def add(a, b):'


def reference():
  """Returns the bundled model as transformers runs it."""
  return transformers.OPTForCausalLM.from_pretrained(
    BUNDLED, dtype=torch.float32
  ).eval()


def logprobs_of(reference, ids):
  """Returns float64 [T, V]: row t is of the token after the first t + 1."""
  with torch.no_grad():
    logits = reference(torch.tensor([ids])).logits[0].double()
  return logits.log_softmax(-1).numpy()


def one(llm, prompt=PROMPT, *, n=1, logprobs=None, echo=False, **params):
  [choices] = complete(
    llm,
    [
      Asked(
        prompt=prompt,
        params=SamplingParams(**params),
        n=n,
        logprobs=logprobs,
        echo=echo,
      )
    ],
  )
  assert len(choices) == n
  return choices[0] if n == 1 else choices


def check_lists(choice):
  """What holds of every choice that lists its tokens."""
  lists = (choice.token_logprobs, choice.top_logprobs, choice.text_offset)
  assert {len(x) for x in lists} == {len(choice.tokens)}
  assert ''.join(choice.tokens) == choice.text
  for text, offset in zip(choice.tokens, choice.text_offset, strict=True):
    assert choice.text[offset : offset + len(text)] == text
  for text, logprob, top in zip(
    choice.tokens, choice.token_logprobs, choice.top_logprobs, strict=True
  ):
    assert (logprob is None) == (top is None)
    assert top is None or top[text] == logprob
