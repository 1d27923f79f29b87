"""Batches of a cache are those of its images."""

import numpy as np
import pytest

from selfboottok_jax import data, pixels
from tests.data import caches, takes


@pytest.fixture
def source():
  return data.ProceduralSource('train', 8, length=50)


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  caches.write(folder, caches.index_of(apart=True))
  return data.open_token_cache(folder, 'train')


def assert_cached(offline, online):
  """Batches of a cache are those of its images, whose codes are pixels."""
  assert len(offline) == len(online)
  for a, b in zip(offline, online, strict=True):
    wanted = pixels.to_float(b['image'])
    if 'mask' in b:
      wanted = np.where(b['mask'][:, None, None, None], wanted, 0)
    assert a['codes'].dtype == np.float32
    np.testing.assert_array_equal(a['codes'].reshape(wanted.shape), wanted)
    for key in b.keys() - {'image'}:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'seed': 3, 'start_step': 5},
    {'flip': False},
    {'process_index': 1, 'process_count': 2, 'num_threads': 0},
    {'process_index': 3, 'process_count': 4, 'start_step': 2},
    {'num_workers': 2},
    {'num_workers': 1, 'process_index': 0, 'process_count': 2},
  ],
  ids=str,
)
def test_a_cache_trains_as_its_images_do(options, source, cached):
  options = {'random_crop': False} | options
  online = takes.take(source, 8, **options | {'num_workers': 0})
  assert_cached(takes.take(cached, 8, **options), online)


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('num_images', [None, 19])
def test_a_cache_is_evaluated_as_its_images_are(
  processes, num_images, source, cached
):
  for i in range(processes):
    online, offline = (
      data.make_eval_dataset(
        s,
        batch_size=8,
        image_size=8,
        num_images=num_images,
        process_index=i,
        process_count=processes,
      )  # fmt: skip
      for s in (source, cached)
    )
    assert_cached(list(offline), list(online))
