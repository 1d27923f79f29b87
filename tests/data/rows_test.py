import numpy as np
import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import rows
from tests.data import caches


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  caches.write(folder)
  return data.open_latents(folder, 'train')


def _train(source, **options):
  options = {'max_scale': None, 'flip': True, 'random_crop': False} | options
  return rows.train_rows(source, caches.SIZE, **options)


@pytest.mark.parametrize('flip', [True, False])
def test_a_cache_is_mirrored_where_its_images_are(flip, cached):
  images = caches.images()
  mirrored = 0
  for seed in range(40):
    online = _train(images, flip=flip)(seed, np.random.default_rng(seed))
    offline = _train(cached, flip=flip)(seed, np.random.default_rng(seed))
    assert set(offline) == {*caches.SHAPES, 'label'}
    np.testing.assert_array_equal(
      offline['codes'].reshape(online['image'].shape), online['image']
    )
    assert offline['label'] == online['label']
    mirrored += (offline['codes'] != cached[seed]['codes'][0]).any()
  assert 10 < mirrored < 30 if flip else not mirrored


def test_pictures_are_scaled_as_told_or_as_the_source_says():
  source = caches.images()
  assert _train(source).transform.max_scale == 1.0
  assert _train(source, max_scale=1.5).transform.max_scale == 1.5


def test_evaluation_sees_images_as_they_are_and_pads_with_zeros(cached):
  for source, wanted in (
    (caches.images(), caches.images()[7]['image']),
    (cached, cached[7]['codes'][0]),
  ):
    read = rows.eval_rows(source, caches.SIZE)
    row, blank = read(7), read.blank()
    name = 'codes' if source is cached else 'image'
    np.testing.assert_array_equal(row[name], wanted)
    assert row.keys() == blank.keys()
    for key, value in blank.items():
      assert not value.any()
      assert value.dtype == row[key].dtype
      assert value.shape == row[key].shape


def test_a_cache_that_does_not_fit_is_refused(cached):
  with pytest.raises(errors.ConfigError, match='random_crop=False'):
    _train(cached, random_crop=True)
  with pytest.raises(errors.ConfigError, match='image_size=8'):
    rows.eval_rows(cached, 16)
