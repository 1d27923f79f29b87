import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from selfboottok_jax import errors
from selfboottok_jax.evaluation import frechet


def _features(count, width, seed=0, shift=0.0, scale=1.0):
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(99).standard_normal((width, width))
  return shift + scale * rng.standard_normal((count, width)) @ mixing


def test_fit_does_not_depend_on_the_batches():
  x = 1e4 + _features(101, 5)  # a large mean: naive sums would lose digits
  fit = frechet.fit([x[:1], x[1:1], x[1:40], x[40:]])
  assert fit.count == 101
  np.testing.assert_allclose(fit.mean, x.mean(axis=0), rtol=1e-14)
  np.testing.assert_allclose(fit.covariance, np.cov(x, rowvar=False), rtol=1e-9)
  left, right = frechet.Moments(), frechet.Moments()
  left.add(x[:70])
  right.add(x[70:])
  right.merge(frechet.Moments())
  right.merge(left)
  np.testing.assert_allclose(right.gaussian().mean, fit.mean, rtol=1e-14)
  np.testing.assert_allclose(
    right.gaussian().covariance, fit.covariance, rtol=1e-9
  )


def test_fit_takes_device_arrays_and_leaves_its_parts_alone():
  batch = jnp.asarray(_features(20, 3), jnp.float32)
  assert frechet.fit([batch]).covariance.dtype == np.float64
  first, total = frechet.Moments(), frechet.Moments()
  first.add(batch)
  before = first.gaussian()
  total.merge(first)
  total.add(batch + 1)
  np.testing.assert_array_equal(first.gaussian().mean, before.mean)


def test_distance_of_known_gaussians():
  eye = np.eye(3)
  zero = np.zeros(3)
  a = frechet.Gaussian(zero, eye, 10)
  b = frechet.Gaussian(np.array([3.0, 0, 4]), 4 * eye, 10)
  # |shift|^2 + sum (1 - 2)^2
  np.testing.assert_allclose(frechet.frechet_distance(a, b), 25 + 3)
  np.testing.assert_allclose(frechet.frechet_distance(b, a), 25 + 3)
  singular = frechet.Gaussian(zero, np.diag([1.0, 0, 0]), 2)
  np.testing.assert_allclose(frechet.frechet_distance(a, singular), 2)


def test_distance_of_features_that_never_change():
  constant = frechet.fit([np.ones((4, 3))])
  assert frechet.frechet_distance(constant, constant) == 0
  moving = frechet.fit([_features(9, 3)])
  wanted = np.square(moving.mean - 1).sum() + np.trace(moving.covariance)
  np.testing.assert_allclose(
    frechet.frechet_distance(constant, moving), wanted, rtol=1e-12
  )


def test_distance_is_that_of_the_matrix_square_root():
  a = frechet.fit([_features(200, 8)])
  b = frechet.fit([_features(150, 8, seed=1, shift=0.3, scale=1.4)])
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  shift = a.mean - b.mean
  wanted = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root)
  np.testing.assert_allclose(frechet.frechet_distance(a, b), wanted, rtol=1e-9)


@pytest.mark.parametrize('count', [2, 5, 40])
def test_distance_with_fewer_images_than_features(count):
  """Rank-deficient: real, zero at equality, and what the factors say."""
  x, y = _features(count, 16), _features(count, 16, seed=1)
  a, b = frechet.fit([x]), frechet.fit([y])
  assert frechet.frechet_distance(a, a) < 1e-8 * np.trace(a.covariance)
  factors = [(v - v.mean(0)) / np.sqrt(count - 1) for v in (x, y)]
  overlap = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
  wanted = np.square(a.mean - b.mean).sum() - 2 * overlap
  wanted += np.trace(a.covariance) + np.trace(b.covariance)
  np.testing.assert_allclose(frechet.frechet_distance(a, b), wanted, rtol=1e-7)


def test_few_images_bias_the_distance_upwards():
  whole = frechet.fit([_features(4000, 16, seed=5)])
  distances = [
    frechet.frechet_distance(whole, frechet.fit([_features(n, 16, seed=6)]))
    for n in (8, 64, 2000)
  ]
  assert distances[0] > distances[1] > distances[2] > 0


def test_errors():
  with pytest.raises(errors.DataError, match='1 images'):
    frechet.fit([np.zeros((1, 3))])
  with pytest.raises(errors.DataError, match='0 images'):
    frechet.fit([])
  with pytest.raises(errors.DataError, match='not finite'):
    frechet.fit([np.full((4, 3), np.nan)])
  a, b = (frechet.fit([_features(9, d)]) for d in (3, 4))
  with pytest.raises(errors.UserError, match='3 against 4'):
    frechet.frechet_distance(a, b)
