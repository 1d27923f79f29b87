import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.objectives import pixel


@pytest.fixture
def pair():
  images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3), minval=-1)
  return images, images + 0.5


@pytest.mark.parametrize(('kind', 'expected'), [('mse', 0.25), ('l1', 0.5)])
def test_of_a_constant_offset(pair, kind, expected):
  value = pixel.pixel_loss(*pair, kind=kind)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize('kind', list(pixel.PIXEL_LOSSES))
def test_zero_only_at_equality_and_float32(pair, kind):
  images, other = pair
  assert pixel.pixel_loss(images, images, kind=kind) == 0
  low = pixel.pixel_loss(images, other.astype(jnp.bfloat16), kind=kind)
  assert low.dtype == jnp.float32
  assert low > 0


def test_default_is_the_mean_square(pair):
  assert pixel.pixel_loss(*pair) == pixel.pixel_loss(*pair, kind='mse')


def test_unknown_kind(pair):
  with pytest.raises(errors.ConfigError, match=r"'huber'.*'l1', 'mse'"):
    pixel.pixel_loss(*pair, kind='huber')
