"""Plans for machines that lack something."""

import dataclasses
import math

import pytest

import flexjax
from flexjax.errors import InputError
from flexjax.policy.search import search
from flexjax.runtime import planning
from tests.machines import GIB, machine

SIZES = {'prompt_len': 16, 'gen_len': 4, 'num_prompts': 4}


def test_one_memory_attends_on_the_host_without_rates_of_its_own():
  record = dataclasses.replace(machine(unified=True), host_attention={})
  choice = planning.plan(
    None, hardware=record, attention='host', cache=(0, 100, 0), **SIZES
  )
  assert choice.plan.policy.attention == 'host'
  assert choice.prediction.seconds > 0


def test_a_disk_that_is_not_known_is_refused():
  links = {
    name: curve for name, curve in machine().links.items() if 'disk' not in name
  }
  record = dataclasses.replace(machine(disk=0), links=links)
  assert planning.plan(None, hardware=record, **SIZES)
  with pytest.raises(InputError, match='says nothing of a disk'):
    planning.plan(None, hardware=record, disk_space='1TB', **SIZES)


def test_a_plan_of_few_prompts_is_of_so_many():
  choice = planning.plan(
    None, hardware=machine(), batch_size=8, num_batches=4, **SIZES
  )
  work = choice.plan.problem.work
  assert (work.batch_size, work.num_batches) == (4, 1)


def test_no_plan_trickles_to_the_disk_beside_an_empty_device():
  choice = planning.plan('opt-1.3b', hardware=machine(), batch_size=8)
  assert set(choice.plan.places.values()) == {'device'}


def test_a_converted_folder_settles_its_format(tmp_path):
  from flexjax.runtime.convert import convert

  convert(None, tmp_path, weight_bits=4, rounding='minmax', dtype='float32')
  choice = planning.plan(tmp_path, hardware=machine(), **SIZES)
  assert choice.plan.policy.weight_bits == 4
  assert choice.plan.problem.dtype == 'float32'


@pytest.mark.parametrize('seconds', [0, -1, math.inf, math.nan])
def test_latencies_that_are_none(seconds):
  with pytest.raises(InputError, match='max_latency'):
    flexjax.load(max_latency=seconds)


def test_a_curve_looks_for_the_best_plan_once(monkeypatch):
  """Every bound starts from the plan without one."""
  bounds = []

  def counted(variants, request, *args, **given):
    bounds.append(request.max_latency)
    return search(variants, request, *args, **given)

  monkeypatch.setattr('flexjax.runtime.ranking.search', counted)
  planning.pareto('opt-125m', hardware=machine(device=GIB // 4))
  assert sum(bound is None for bound in bounds) == 2  # and the shortest
  assert len(bounds) > 4


def test_curve_keeps_within_what_is_asked():
  given = {'model': 'opt-125m', 'hardware': machine(device=GIB // 4)}
  curve = planning.pareto(**given)
  longest = curve[-1].prediction.seconds
  shorter = planning.pareto(**given, max_latency=longest / 2)
  assert len(shorter) > 1
  assert shorter[-1].prediction.seconds <= longest / 2
