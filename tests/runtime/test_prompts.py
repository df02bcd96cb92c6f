"""What stands for the parameters of prompts, and what does not."""

import pytest

from flexjax import InputError, SamplingParams
from flexjax.runtime.prompts import params_of


def test_one_may_stand_for_all():
  one, other = SamplingParams(seed=1), SamplingParams(seed=2)
  assert params_of(['a', 'b'], one) == [one, one]
  assert params_of(['a', 'b'], None) == [SamplingParams()] * 2
  assert params_of(['a', 'b'], (one, other)) == [one, other]


@pytest.mark.parametrize(
  ('prompts', 'params', 'message'),
  [
    ('abc', None, 'a list'),
    (['a', 'b'], [SamplingParams()], '1 sampling parameters for 2 prompts'),
    (['a'], {'max_new_tokens': 3}, "not 'max_new_tokens'"),
    (['a'], [{'max_new_tokens': 3}], 'are SamplingParams'),
  ],
)
def test_refused(prompts, params, message):
  with pytest.raises(InputError, match=message):
    params_of(prompts, params)
