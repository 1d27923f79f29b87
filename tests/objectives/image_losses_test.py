import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.objectives import image_losses


@pytest.fixture
def pair():
  images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3), minval=-1)
  return images, images + 0.5


@pytest.mark.parametrize(('kind', 'expected'), [('mse', 0.25), ('l1', 0.5)])
def test_of_a_constant_offset(pair, kind, expected):
  value = image_losses.pixel_loss(*pair, kind=kind)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize('kind', list(image_losses.PIXEL_LOSSES))
def test_zero_only_at_equality_and_float32(pair, kind):
  images, other = pair
  assert image_losses.pixel_loss(images, images, kind=kind) == 0
  low = image_losses.pixel_loss(images, other.astype(jnp.bfloat16), kind=kind)
  assert low.dtype == jnp.float32
  assert low > 0


def test_default_is_the_mean_square(pair):
  assert image_losses.pixel_loss(*pair) == image_losses.pixel_loss(
    *pair, kind='mse'
  )


def test_unknown_kind(pair):
  with pytest.raises(errors.ConfigError, match="kind='huber'.*mse, l1"):
    image_losses.pixel_loss(*pair, kind='huber')


def distance(params, a, b):
  """A distance that is not symmetric, to see what goes where."""
  return jnp.sum(params['scale'] * a - b, axis=(1, 2, 3))


@pytest.mark.parametrize(
  ('step', 'warmup_steps', 'expected'),
  [(0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0), (99, 10, 1.0), (0, 0, 1.0)],
)
def test_warm_up(step, warmup_steps, expected):
  assert image_losses.warm_up(step, warmup_steps) == expected
  traced = jax.jit(lambda step: image_losses.warm_up(step, warmup_steps))
  assert traced(jnp.int32(step)) == expected


def test_loss_is_the_mean_distance():
  images = jnp.zeros((2, 2, 2, 3))
  reconstruction = jnp.ones((2, 2, 2, 3)).at[1].set(2.0)
  loss = image_losses.perceptual_loss(
    distance,
    {'scale': jnp.float32(3.0)},
    images,
    reconstruction,
  )
  np.testing.assert_allclose(loss, 3 * 12 * 1.5)


def test_low_precision_distances_are_averaged_in_float32():
  zeros = jnp.zeros((2, 2, 2, 3))
  loss = image_losses.perceptual_loss(
    lambda params, a, b: jnp.full((2,), 1.0, jnp.bfloat16),
    {},
    zeros,
    zeros,
  )
  assert loss.dtype == jnp.float32
  assert loss == 1.0


def test_psnr_of_errors_that_are_known():
  images = jnp.zeros((3, 2, 2, 3))
  # 10 log10(4 / error^2), the second clipped to 1, and the cap.
  errors_ = jnp.array([0.2, 1.7, 0.0])[:, None, None, None]
  expected = (20 + 10 * np.log10(4) + image_losses.MOST_PSNR) / 3
  value = image_losses.psnr(images, images + errors_)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
