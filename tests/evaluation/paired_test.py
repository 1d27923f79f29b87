import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pixels, pretrained, trees
from selfboottok_jax.evaluation import paired, scores
from selfboottok_jax.training import sharding

COUNT, SIZE = 13, 16


@pytest.fixture(scope='module')
def images():
  rng = np.random.default_rng(0)
  original = rng.integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)
  noise = rng.integers(-40, 40, original.shape)
  return original, np.clip(original + noise, 0, 255).astype(np.uint8)


def _measure(images, batch_size, devices):
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:devices])
  hog = pretrained.load_perceptual('hog', patch_size=4)
  measure = paired.PairedScores(
    ('psnr', 'ssim_range2'), {'distance_hog': hog}, mesh
  )
  padding = ((0, -COUNT % batch_size), (0, 0), (0, 0), (0, 0))
  # Padding that would be noticed.
  original, made = (
    np.pad(x, padding, constant_values=v)
    for x, v in zip(images, (255, 0), strict=True)
  )
  mask = np.arange(len(made)) < COUNT
  for first in range(0, len(made), batch_size):
    rows = slice(first, first + batch_size)
    batch = {'image': made[rows], 'original': original[rows]}
    measure.add(sharding.put_batch({**batch, 'mask': mask[rows]}, mesh))
  return measure.finish()


def test_scores_are_means_over_images_without_the_padding(images):
  original, made = map(jnp.asarray, images)
  hog = pretrained.load_perceptual('hog', patch_size=4)
  expected = {
    'psnr': scores.psnr(original, made),
    'ssim_range2': scores.ssim_range2(original, made),
    'distance_hog': hog(
      hog.params, pixels.to_float(original), pixels.to_float(made)
    ),
  }
  found = _measure(images, 8, 8)
  assert [name for name, _, _ in found] == list(expected)
  for name, value, protocol in found:
    mean = np.mean(np.asarray(expected[name], np.float64))
    np.testing.assert_allclose(value, mean, rtol=1e-6)
    assert protocol['count'] == COUNT
    assert protocol['description']
  of_distance = found[-1][2]
  assert of_distance['network'] == 'hog'
  assert of_distance['weights'] == trees.weights_hash(hog.params)


@pytest.mark.parametrize(('batch_size', 'devices'), [(4, 1), (16, 8), (13, 1)])
def test_batches_and_devices_change_no_score(images, batch_size, devices):
  expected = _measure(images, 8, 8)
  found = _measure(images, batch_size, devices)
  for (name, value, _), (_, other, _) in zip(expected, found, strict=True):
    np.testing.assert_allclose(other, value, rtol=1e-6, err_msg=name)


def test_no_images_have_no_score():
  measure = paired.PairedScores(('psnr',), {}, sharding.make_mesh(fsdp=1))
  with pytest.raises(errors.DataError, match='no images to score'):
    measure.finish()
