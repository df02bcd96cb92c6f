"""flexjax generate: prompts in, text out.

  flexjax generate --prompt="def add(a, b):"
  flexjax generate --model=DIR --input=prompts.jsonl --output=out.jsonl

--input takes a prompt per line, or, where the name ends in .jsonl, an object
per line with `prompt` (text or token ids) and any sampling field. --output
gets an object per line: index, prompt, text, token_ids, finish_reason.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from absl import flags

from flexjax.cli import files, report
from flexjax.cli import flags as shared
from flexjax.config import SamplingParams
from flexjax.errors import InputError

FLAGS = flags.FLAGS
_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams))


def define() -> None:
  shared.define_policy()
  report.define()
  report.define_trace()
  flags.DEFINE_multi_string('prompt', [], 'A prompt; may be given repeatedly.')
  flags.DEFINE_string('input', None, 'File of prompts: text lines or .jsonl.')
  flags.DEFINE_string(
    'output',
    None,
    'File of results, JSONL, in place of one that is there. Default: standard '
    'output, where results of --prompt are plain text.',
  )
  shared.define_sampling()


def run() -> None:
  prompts, params = _requests()
  shared.check_files('output', 'stats', 'trace', read=('input',))
  with shared.open_model() as llm, report.progress(llm):
    llm.record = bool(FLAGS.trace)
    with contextlib.closing(llm.stream(prompts, params)) as results:
      _write(results)
  report.write_trace(llm)
  report.show(llm)


def _write(results) -> None:
  """Writes every result as soon as it is there, in whole lines."""
  out: TextIO | None = None
  with contextlib.ExitStack() as stack:
    for result in results:
      if out is None:  # not before there is something to write
        out = sys.stdout
        if FLAGS.output:
          out = stack.enter_context(open(FLAGS.output, 'w', encoding='utf-8'))
      if FLAGS.prompt and not FLAGS.output:
        line = f'{result.prompt}{result.text}'
      else:
        line = json.dumps(dataclasses.asdict(result), ensure_ascii=False)
      out.write(line + '\n')
      out.flush()


def _requests() -> tuple[list, list[SamplingParams]]:
  """Reads prompts and their parameters from the flags and the input file."""
  if bool(FLAGS.prompt) == bool(FLAGS.input):
    raise InputError('give either --prompt or --input')
  default = shared.sampling()
  if FLAGS.prompt:
    return FLAGS.prompt, [default] * len(FLAGS.prompt)
  path = Path(FLAGS.input)
  lines = files.read_lines(path, 'prompts')
  if path.suffix != '.jsonl':
    return [line for _, line in lines], [default] * len(lines)
  parsed = [_parse(where, line, default) for where, line in lines]
  return [prompt for prompt, _ in parsed], [params for _, params in parsed]


def _parse(
  where: str, line: str, default: SamplingParams
) -> tuple[Any, SamplingParams]:
  """Reads a JSONL line; `where` names it in errors."""
  fields = files.parse_object(where, line, 'prompt')
  prompt = fields.pop('prompt')
  if not isinstance(prompt, str) and not (
    isinstance(prompt, list) and all(type(token) is int for token in prompt)
  ):
    raise InputError(f"{where}: 'prompt' must be text or a list of token ids")
  if unknown := sorted(fields.keys() - set(_FIELDS)):
    raise InputError(
      f"{where}: unknown field '{unknown[0]}'; there are prompt, "
      f'{", ".join(_FIELDS)}'
    )
  try:
    return prompt, dataclasses.replace(default, **fields)
  except InputError as e:
    raise InputError(f'{where}: {e}') from None
