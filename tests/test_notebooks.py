"""The notebooks run on the tables beside them, and without any; none has
outputs in the repository."""

import json
import shutil
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob('experiments/*/analysis.ipynb'))
QUICKSTART = ROOT / 'notebooks' / 'quickstart.ipynb'
SECONDS = 60  # for each


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """The name of a kernel of this very interpreter, whatever is installed."""
  folder = tmp_path / 'jupyter' / 'kernels' / 'here'
  folder.mkdir(parents=True)
  start = [sys.executable, '-m', 'ipykernel_launcher', '-f']
  spec = {
    'argv': [*start, '{connection_file}'],
    'display_name': 'here',
    'language': 'python',
  }
  (folder / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
  for name in ('JUPYTER_RUNTIME_DIR', 'IPYTHONDIR', 'MPLCONFIGDIR'):
    monkeypatch.setenv(name, str(tmp_path / name.lower()))
  return 'here'


@pytest.mark.slow
@pytest.mark.parametrize('tables', [True, False], ids=['tables', 'no tables'])
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.parent.name)
def test_runs(path, tables, kernel, tmp_path):
  folder = tmp_path / path.parent.name
  shutil.copytree(path.parent, folder)
  if not tables:
    for table in folder.glob('*.csv'):
      table.unlink()
  notebook = nbformat.read(folder / path.name, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=SECONDS,
    kernel_name=kernel,
    resources={'metadata': {'path': str(folder)}},
  ).execute()


@pytest.mark.slow
def test_quickstart(kernel, tmp_path):
  notebook = nbformat.read(QUICKSTART, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=4 * SECONDS,
    kernel_name=kernel,
    resources={'metadata': {'path': str(tmp_path)}},
  ).execute()
  lines = (tmp_path / 'quickstart_output' / 'results.jsonl').read_text()
  answers = [json.loads(line) for line in lines.splitlines()]
  assert len(answers) == 36
  assert all(answer['token_ids'] for answer in answers)


@pytest.mark.parametrize('path', [*NOTEBOOKS, QUICKSTART], ids=lambda p: p.stem)
def test_has_no_outputs(path):
  cells = json.loads(path.read_text())['cells']
  assert not [cell for cell in cells if cell.get('outputs')]
