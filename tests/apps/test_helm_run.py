"""HELM itself at work with the client: its dispatcher, adapters, figures."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flexjax
from flexjax.data.tokenizer import Tokenizer
from flexjax.runtime.sources import BUNDLED

# HELM and what it imports warn of much that is not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(autouse=True)
def _helm():
  pytest.importorskip('helm')


FILES = {
  'model_deployments.yaml': """
model_deployments:
  - name: flexjax/tiny
    model_name: flexjax/tiny
    tokenizer_name: flexjax/tiny
    max_sequence_length: 1022
    max_request_length: 1023
    max_sequence_and_generated_tokens_length: 1023
    client_spec:
      class_name: flexjax.apps.helm.FlexJaxClient
      args: {dtype: float32, batch_size: 4}
""",
  'tokenizer_configs.yaml': f"""
tokenizer_configs:
  - name: flexjax/tiny
    tokenizer_spec:
      class_name: helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer
      args: {{pretrained_model_name_or_path: {BUNDLED}}}
    end_of_text_token: "</s>"
    prefix_token: "</s>"
""",
  'model_metadata.yaml': """
models:
  - name: flexjax/tiny
    display_name: tiny
    description: tiny
    creator_organization_name: flexjax
    access: open
    release_date: 2025-01-01
    tags: [TEXT_MODEL_TAG]
""",
}
PLUGIN = """
from pathlib import Path
from helm.benchmark.adaptation import common_adapter_specs as adapters
from helm.benchmark.metrics import common_metric_specs as metrics
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
  Input, Instance, Scenario, ScenarioSpec, TEST_SPLIT,
)

class Text(Scenario):
  name, description, tags = 'text', 'a text', []
  def get_instances(self, output_path):
    text = Path(__file__).with_name('text.txt').read_text()
    return [Instance(Input(text=text), references=[], split=TEST_SPLIT)]

@run_spec_function('text')
def text():
  return RunSpec(
    name='text',
    scenario_spec=ScenarioSpec(class_name='text_plugin.Text'),
    adapter_spec=adapters.get_language_modeling_adapter_spec(),
    metric_specs=metrics.get_language_modeling_metric_specs([]),
  )
"""


def test_dispatcher(tmp_path):
  """A client that HELM makes by a file like that of docs/helm.md."""
  from helm.benchmark.model_deployment_registry import (
    register_model_deployments_from_path,
  )
  from helm.clients.auto_client import AutoClient
  from helm.common.cache import BlackHoleCacheConfig
  from helm.common.cache_backend_config import BlackHoleCacheBackendConfig
  from helm.common.request import Request

  from flexjax.apps.helm import FlexJaxClient

  file = tmp_path / 'model_deployments.yaml'
  file.write_text(f"""model_deployments:
  - name: flexjax/tiny
    model_name: flexjax/tiny
    tokenizer_name: facebook/opt-66b
    max_sequence_length: 2046
    client_spec:
      class_name: flexjax.apps.helm.FlexJaxClient
      args:
        pretrained_model_name_or_path: {BUNDLED}
        dtype: float32
        weights: [50, 50, 0]
        batch_size: 2
""")
  register_model_deployments_from_path(str(file))
  auto = AutoClient({}, str(tmp_path), BlackHoleCacheBackendConfig())
  request = Request(
    model_deployment='flexjax/tiny',
    model='flexjax/tiny',
    prompt='def add(a, b):',
    temperature=0,
    max_tokens=5,
  )
  result = auto.make_request(request)
  assert result.success, result.error
  here = FlexJaxClient(BlackHoleCacheConfig(), dtype='float32').make_request(
    request
  )
  assert result.completions[0].text == here.completions[0].text


@pytest.mark.slow
def test_perplexity(tmp_path):
  """Two windows: HELM counts every token of the text once, and no other."""
  tokenizer = Tokenizer.open(BUNDLED)
  ids = tokenizer.encode(inspect.getsource(inspect), leading=False)[:1500]
  text = tokenizer.decode(ids)
  assert tokenizer.encode(text, leading=False) == ids
  (tmp_path / 'prod_env').mkdir()
  for name, content in FILES.items():
    (tmp_path / 'prod_env' / name).write_text(content)
  (tmp_path / 'text_plugin.py').write_text(PLUGIN)
  (tmp_path / 'text.txt').write_text(text)
  roots = [str(tmp_path), str(Path(flexjax.__file__).parents[1])]
  command = ['--plugins', 'text_plugin', '--exit-on-error', '--suite', 's']
  command += ['--run-entries', 'text:model=flexjax/tiny']
  command += ['--max-eval-instances', '1', '--local-path', 'prod_env']
  subprocess.run(
    [sys.executable, '-m', 'helm.benchmark.run', *command],
    cwd=tmp_path,
    env={
      **os.environ,
      'PYTHONPATH': os.pathsep.join(roots),
      'HF_HUB_OFFLINE': '1',
      'JAX_PLATFORMS': 'cpu',
    },
    check=True,
    capture_output=True,
  )
  [file] = tmp_path.glob('benchmark_output/runs/s/text*/stats.json')
  stats = {s['name']['name']: s for s in json.loads(file.read_text())}
  # HELM takes the mean of the two windows' counts.
  assert 2 * stats['num_perplexity_tokens']['sum'] == 1500
  leading = tokenizer.encode('')
  with flexjax.load(dtype='float32') as llm:
    first, rest = llm.score([leading + ids[:1022], leading + ids[-1023:]])
  total = sum(first.logprobs[1:]) + sum(rest.logprobs[-(1500 - 1022) :])
  assert stats['perplexity']['mean'] == pytest.approx(
    math.exp(-total / 1500), rel=1e-4
  )
