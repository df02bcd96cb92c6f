"""The harness's model `flexjax` beside its own model `hf`, on whole tasks."""

import pytest

from tests.lm_eval_tasks import TASKS, close, evaluate, write

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  write(folder)
  return folder


@pytest.fixture(scope='module', params=[{}, {'max_length': 60}], ids=str)
def both(request, tasks):
  """Results of both models, in the whole context and in a short one."""
  theirs = evaluate(
    tasks, 'hf', {'device': 'cpu', 'batch_size': 1, **request.param}
  )
  mine = evaluate(tasks, 'flexjax', {'batch_size': 4, **request.param})
  return mine, theirs


def answers(results, name):
  """Returns what the model said to each request of a task, in their order."""
  samples = sorted(
    results['samples'][f'local_{name}'], key=lambda s: s['doc_id']
  )
  return [answer for s in samples for [answer] in s['resps']]


def test_log_likelihoods(both):
  mine, theirs = (
    answers(results, 'choice') + answers(results, 'words') for results in both
  )
  assert len(mine) > 40
  assert len({greedy for _, greedy in mine}) == 2
  assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
  close([x for x, _ in mine], [x for x, _ in theirs])


def test_rolling_log_likelihoods(both):
  close(*(answers(results, 'rolling') for results in both))


def test_generated_text(both):
  mine, theirs = (answers(results, 'continued') for results in both)
  assert mine == theirs
  assert len(set(mine)) > 5
  assert not any(':' in text or '\n\n' in text for text in mine)


def test_metrics(both):
  mine, theirs = (results['results'] for results in both)
  assert mine.keys() == theirs.keys() == {f'local_{name}' for name in TASKS}
  for name, figures in theirs.items():
    numbers = {n: x for n, x in figures.items() if isinstance(x, float)}
    assert numbers
    for n, x in numbers.items():
      assert mine[name][n] == pytest.approx(x, rel=1e-5, abs=1e-5), n
  for name, figure in (
    ('choice', 'acc'),
    ('choice', 'acc_norm'),
    ('words', 'acc'),
    ('continued', 'exact_match'),
  ):
    assert 0 < mine[f'local_{name}'][f'{figure},none'] < 1
