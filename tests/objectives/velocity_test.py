import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.objectives import velocity


def _arrays():
  keys = jax.random.split(jax.random.key(0), 3)
  x, noise, off = (jax.random.normal(k, (4, 5, 3)) for k in keys)
  return x, noise, off, jnp.asarray([0.1, 0.4, 0.7, 1.0])


@pytest.mark.parametrize('name', sorted(path_lib.PATHS))
def test_loss_is_the_squared_distance_from_the_target(name):
  x, noise, off, t = _arrays()
  path = path_lib.PATHS[name]
  target = path.velocity(x, noise, t)
  zero = velocity.velocity_loss(target, x, noise, t, path)
  np.testing.assert_array_equal(zero, np.zeros(4))
  some = velocity.velocity_loss(target + off, x, noise, t, path)
  np.testing.assert_allclose(some, (off**2).mean((1, 2)), rtol=1e-4)


def test_linear_target_is_noise_minus_data_and_samples_stay_apart():
  x, noise, _, t = _arrays()
  path = path_lib.PATHS['linear']
  prediction = (noise - x).at[2].add(2.0)
  loss = velocity.velocity_loss(prediction, x, noise, t, path)
  np.testing.assert_allclose(loss, [0, 0, 4, 0], rtol=1e-5)


def test_low_precision_predictions_are_compared_in_float32():
  x, noise, _, t = _arrays()
  path = path_lib.PATHS['linear']
  prediction = (noise - x).astype(jnp.bfloat16)
  loss = velocity.velocity_loss(prediction, x, noise, t, path)
  assert loss.dtype == jnp.float32
  rounding = prediction.astype(jnp.float32) - (noise - x)
  np.testing.assert_allclose(loss, (rounding**2).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize('name', sorted(path_lib.PATHS))
def test_cosine_is_blind_to_length_and_sees_direction(name):
  x, noise, off, t = _arrays()
  path = path_lib.PATHS[name]
  target = path.velocity(x, noise, t)
  for scale, wanted in ((1.0, 0.0), (7.0, 0.0), (-2.0, 2.0)):
    loss = velocity.velocity_cosine(scale * target, x, noise, t, path)
    np.testing.assert_allclose(loss, np.full(4, wanted), atol=1e-5)
  some = velocity.velocity_cosine(off, x, noise, t, path)
  norms = np.linalg.norm(off, axis=-1) * np.linalg.norm(target, axis=-1)
  cosine = np.sum(np.asarray(off * target), axis=-1) / norms
  np.testing.assert_allclose(some, (1 - cosine).mean(axis=1), rtol=1e-4)


def test_cosine_of_a_fresh_network_has_a_finite_gradient():
  x, noise, _, t = _arrays()
  gradient = jax.grad(
    lambda v: jnp.sum(
      velocity.velocity_cosine(v, x, noise, t, path_lib.PATHS['linear'])
    )
  )(jnp.zeros_like(x))
  assert np.all(np.isfinite(gradient))
