"""Two processes of one machine train as two hosts do."""

import numpy as np
import pytest

from tests.launch import commands, logs


def _metrics(workdir):
  """(step, name) -> value."""
  return {
    (record['step'], name): value
    for record in logs.read(workdir)
    for name, value in record.items()
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'task',
  [
    # Tokenizers have a critic, and a scaled one has a base too.
    *(
      pytest.param(task, marks=pytest.mark.long)
      for task in ('tokenizer', 'scaling')
    ),
    'generator',
  ],
)
def test_two_processes_train_as_one(task, server, runs, tmp_path):
  arguments = [f'--config=tests/launch/tiny.py:{task}']
  if task != 'tokenizer':
    arguments.append(f'--config.tokenizer={runs / "tokenizer"}')
  if task != 'generator':
    arguments.append('--config.evaluation.perceptual=hog')
    arguments.append('--config.evaluation.frechet=hog')
  result = server.run('train', *arguments, f'--workdir={tmp_path / "alone"}')
  assert result.code == 0, result.err
  arguments.append(f'--workdir={tmp_path / "together"}')
  first, second = commands.run_together('train', *arguments)
  assert 'step 2' in first.err
  assert 'step' not in second.err
  alone, together = (_metrics(tmp_path / w) for w in ('alone', 'together'))
  assert together.keys() == alone.keys()
  for key, value in alone.items():
    np.testing.assert_allclose(
      together[key], value, rtol=1e-3, atol=1e-4, err_msg=str(key)
    )
  if task != 'generator':
    assert {'val/psnr_global_only', 'val/distance_hog', 'val/fd_hog'} <= {
      name for _, name in alone
    }
    assert (tmp_path / 'together/reconstructions/2.png').is_file()
  # Both restore what both saved, and go on.
  commands.run_together('train', *arguments, '--config.train.steps=3')
  metrics = _metrics(tmp_path / 'together')
  assert {step for step, name in metrics if name == 'loss'} == {1, 2, 3}


@pytest.mark.slow
def test_two_processes_measure_the_samples_of_one(server, runs, tmp_path):
  arguments = [
    '--config=tests/launch/tiny.py:generator',
    f'--config.tokenizer={runs / "tokenizer"}',
    '--config.evaluation.num_samples=7',
  ]
  alone, together = tmp_path / 'alone', tmp_path / 'together'
  result = server.run('train', *arguments, f'--workdir={alone}')
  assert result.code == 0, result.err
  commands.run_together('train', *arguments, f'--workdir={together}')
  name = (2, 'val/fd_hog')
  np.testing.assert_allclose(
    _metrics(together)[name], _metrics(alone)[name], rtol=1e-2
  )
