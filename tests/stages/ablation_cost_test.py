import pathlib

import pytest

from selfboottok_jax.presets import ablations
from selfboottok_jax.stages import ablation, ablation_cost
from selfboottok_jax.training import logging as logging_lib
from tests import tiny

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'results' / 'scaling.md'


def _account() -> ablation_cost.Account:
  sizes = [
    ablation_cost.Size('10m', 10, 1.0, whole=100.0, stage2=40.0),
    ablation_cost.Size('100m', 30, 3.0, whole=120.0, stage2=60.0),
  ]
  return ablation_cost.Account('base', sizes, 100.0, 20, 2.0, 50.0)


def test_lines_by_hand():
  assert _account().lines() == {
    # 10 + 30 + 2 * 20 and 10 + 30 + 20.
    'parameters': (80, 60),
    'forward': (8.0, 6.0),
    # (100 + 50) + (120 + 50) and 100 + 40 + 60 + 50.
    'training': (320.0, 250.0),
    # The larger tokenizer and its generator; stage 1 and the longer stage 2.
    'chain': (170.0, 160.0),
    'time': (320.0, 160.0),
  }


def test_the_papers_claims_are_what_its_numbers_give():
  saved = {k: round(100 * v[2], 1) for k, v in ablation_cost.CLAIMS.items()}
  assert saved == {'parameters': 39.8, 'forward': 39.0, 'time': 53.6}


def test_a_section_names_savings_beside_the_papers():
  text = ablation_cost.page(_account())
  assert '| parameters of all networks | 80.00 | 60.00 | 25.0% |' in text
  assert '4.9B to 2.95B: 39.8% |' in text
  assert '| 320.0 | 250.0 | 21.9% | not given |' in text


def test_a_block_of_the_aligner_costs_what_its_matrices_do():
  shallow, deep = (
    ablation_cost.forward_flops(tiny.make_tokenizer(local2d_depth=depth))
    for depth in (1, 2)
  )
  width, tokens = 16, 2 * 8
  weights = 2 * 12 * width**2 * tokens
  attention = 2 * 2 * tokens**2 * width
  assert deep - shallow == weights + attention


def test_rows_say_how_many_trainings_they_share():
  plans = [
    ablation.plan(row, ablation.Settings('photos64'))
    for row in ablations.ROWS
    if row.table == 'figure6'
  ]
  (sentence,) = ablation_cost.saved_by_sharing(plans)
  assert '15 trainings' in sentence
  assert '7 are run' in sentence
  assert not ablation_cost.saved_by_sharing(plans[:1])


def test_cost_of_a_row_is_that_of_its_runs(runs):
  """The runs are of other presets, and only stand where the row's would."""
  plan = ablation.plan(
    ablations.find('figure6/10m'), ablation.Settings('photos64')
  )
  folders = [runs / name for name in ('tokenizer', 'scaled', 'generator')]
  found = ablation_cost.measure(
    plan, dict(zip(plan.trainings, folders, strict=True))
  )
  operations = 0.0
  for training, folder in zip(plan.trainings, folders, strict=True):
    images = training.config.train.steps * training.config.data.batch_size
    card = ablation_cost.cost.read(folder)
    operations += card.flops.total * images / 1e15
  assert found['train_pflops'][0] == pytest.approx(operations)
  assert found['train_seconds'][0] == sum(
    logging_lib.seconds(folder / logging_lib.METRICS) for folder in folders
  )
  assert found['parameters'][0] == ablation.count_parameters(plan.scored.model)


@pytest.mark.parametrize('base', ['photos64', 'imagenet256'])
def test_the_page_has_the_parameters_of_the_presets(base):
  text = PAGE.read_text()
  section = text.partition(f'## {base}\n')[2].partition('\n## ')[0]
  settings = ablation.Settings(base)
  for size in ('10m', '600m'):
    plan = ablation.plan(ablations.find(f'figure6/{size}'), settings)
    model = plan.scored.model
    forward = ablation_cost.forward_flops(model)
    assert (
      f'| {size} | {ablation.count_parameters(model):,} | '
      f'{ablation_cost._short(forward)} |'
    ) in section


@pytest.mark.slow
@pytest.mark.long
def test_the_page_is_what_the_code_counts():
  """Traces twelve trainings; the other section is made the same way."""
  made = ablation_cost.account(ablation.Settings('photos64'))
  assert ablation_cost.page(made).strip() in PAGE.read_text()
