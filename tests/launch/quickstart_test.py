import json

import numpy as np
import pytest

from selfboottok_jax import trees
from selfboottok_jax.evaluation import evaluate
from selfboottok_jax.training import checkpointing
from tests.launch import logs


# The other tests read runs that only seem to be trained. .ci/run has a
# quickstart of its own.
@pytest.mark.long
@pytest.mark.slow
def test_trains_four_runs_and_writes_a_report(server, tmp_path):
  result = server.run('quickstart', f'--workdir={tmp_path}')
  assert result.code == 0, result.err
  page = (tmp_path / 'report.html').read_text()
  assert 'SelfBootTok quickstart' in page
  assert '{{' not in page
  out = result.out
  for name in ('SoftVQ baseline', 'SelfBootTok, stage 1', 'Generator'):
    assert name in page
    assert name in out
  assert f'{tmp_path}/report.html written' in out
  assert len(list(tmp_path.rglob('*.png'))) >= 2
  # `launch.report` finds the scores of each run in its folder.
  for folder, metric in {
    'softvq': 'psnr',
    'tokenizer': 'psnr',
    'scaled': 'psnr',
    'generator': 'fd_hog',
  }.items():
    found = evaluate.read_scores(tmp_path / folder)
    assert metric in [score.metric for score in found]
    assert len({score.run for score in found}) == 1
  tasks = {
    folder.name: (
      json.loads((folder / 'config.json').read_text())['task'],
      checkpointing.latest_step(str(folder)),
    )
    for folder in tmp_path.iterdir()
    if (folder / 'config.json').exists()
  }
  assert tasks == {
    'softvq': ('tokenizer', 2),
    'tokenizer': ('tokenizer', 2),
    'scaled': ('scaling', 2),
    'generator': ('generator', 2),
  }
  for name in tasks:
    first, *_ = logs.read(tmp_path / name)
    assert np.isfinite(first['loss'])
    assert first['loss'] != 1


def test_baseline_differs_from_stage_1_in_its_aligners_alone(runs):
  baseline, stage1 = (
    trees.flatten(checkpointing.read_config(str(runs / name), 'test'))
    for name in ('softvq', 'tokenizer')
  )
  assert {k for k in stage1 if stage1[k] != baseline[k]} == {
    'model.local1d_width',
    'model.local2d_depth',
  }


@pytest.mark.parametrize(
  ('budget', 'share'), [(1.0, 1.0), (0.5, 0.5), (3.0, 3.0), (1e-6, 0.0)]
)
def test_budget_scales_steps(budget, share, tmp_path):
  from launch import quickstart

  whole = quickstart._make_configs(tmp_path, 1.0)
  scaled = quickstart._make_configs(tmp_path, budget)
  assert list(scaled) == list(quickstart.FOLDERS)
  for name, config in scaled.items():
    steps = whole[name].train.steps
    assert config.train.steps == max(2, round(share * steps))
    config.train.steps = steps
    assert config == whole[name]
