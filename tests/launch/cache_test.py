"""A training on a cache is the training on its images."""

import numpy as np
import pytest

from tests.launch import logs

# Ten trainings and caches.
pytestmark = pytest.mark.slow

CONFIG = '--config=tests/launch/tiny.py:generator'
STEPS = 6


@pytest.fixture(scope='module')
def caches(server, runs, tmp_path_factory):
  """The built-in scenes, encoded in both types."""
  folder = tmp_path_factory.mktemp('caches')
  for dtype in ('float32', 'float16'):
    result = server.run(
      'encode',
      CONFIG,
      f'--config.tokenizer={runs / "tokenizer"}',
      f'--out={folder / dtype}',
      f'--dtype={dtype}',
    )
    assert result.code == 0, result.err
  return folder


def _train(server, workdir, tokenizer, *more):
  return server.run(
    'train',
    CONFIG,
    f'--config.tokenizer={tokenizer}',
    f'--config.train.steps={STEPS}',
    '--config.checkpoint.every=3',
    f'--workdir={workdir}',
    *more,
  )


def _losses(workdir):
  """(step, name) -> value, of everything but rates."""
  return {
    (record['step'], name): value
    for record in logs.read(workdir)
    for name, value in record.items()
    if name != 'step'
  }


def _assert_close(one, other, tolerance):
  assert one.keys() == other.keys()
  assert {name for _, name in one} >= {
    'loss',
    'loss/velocity',
    'loss/cls',
    'loss/alignment',
    'val/velocity_loss',
    'val/cls_loss',
  }
  np.testing.assert_allclose(
    list(other.values()), list(one.values()), rtol=tolerance, atol=tolerance
  )


@pytest.fixture(scope='module')
def online(server, runs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('online')
  result = _train(server, workdir, runs / 'tokenizer')
  assert result.code == 0, result.err
  return workdir


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [('float32', 2e-5), ('float16', 2e-3)]
)
def test_losses_are_those_of_the_images(
  server, runs, caches, online, tmp_path, dtype, tolerance
):
  result = _train(
    server,
    tmp_path,
    runs / 'tokenizer',
    f'--config.data.cache={caches / dtype}',
  )
  assert result.code == 0, result.err
  _assert_close(_losses(online), _losses(tmp_path), tolerance)
  # Other seeds are other noise: equality above means something.
  other = tmp_path / 'other'
  result = _train(
    server,
    other,
    runs / 'tokenizer',
    f'--config.data.cache={caches / dtype}',
    '--config.train.seed=1',
  )
  assert result.code == 0, result.err
  first = _losses(online)[1, 'loss'], _losses(other)[1, 'loss']
  assert abs(first[0] - first[1]) > 10 * tolerance


def test_a_run_goes_on_from_images_to_a_cache(
  server, runs, caches, online, tmp_path
):
  workdir = tmp_path / 'run'
  half = '--config.train.steps=3'
  result = _train(server, workdir, runs / 'tokenizer', half)
  assert result.code == 0, result.err
  cache = f'--config.data.cache={caches / "float32"}'
  result = _train(server, workdir, runs / 'tokenizer', cache)
  assert result.code == 0, result.err
  found, wanted = _losses(workdir), _losses(online)
  last = [key for key in wanted if key[0] > 3]
  np.testing.assert_allclose(
    [found[key] for key in last],
    [wanted[key] for key in last],
    rtol=1e-4,
    atol=1e-4,
  )


def test_another_makers_cache_is_refused(server, runs, caches, tmp_path):
  cache = f'--config.data.cache={caches / "float32"}'
  for tokenizer, more, told in (
    ('softvq', (), 'was made with tokenizer='),
    ('tokenizer', ('--config.networks.teacher=random',), 'teacher=hog'),
    ('tokenizer', ('--config.loss.align_mode=global',), 'align_mode=repeat'),
    ('tokenizer', ('--config.data.random_crop=True',), 'centre crops'),
    ('tokenizer', ('--config.evaluation.num_samples=4',), 'data.path'),
  ):
    result = _train(server, tmp_path / 'run', runs / tokenizer, cache, *more)
    assert told in result.error, result.error
  assert not (tmp_path / 'run').exists()
