import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import perceptual


def distance(params, a, b):
  """A distance that is not symmetric, to see what goes where."""
  return jnp.sum(params['scale'] * a - b, axis=(1, 2, 3))


@pytest.mark.parametrize(
  ('step', 'warmup_steps', 'expected'),
  [(0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0), (99, 10, 1.0), (0, 0, 1.0)],
)
def test_warm_up(step, warmup_steps, expected):
  assert perceptual.warm_up(step, warmup_steps) == expected
  traced = jax.jit(lambda step: perceptual.warm_up(step, warmup_steps))
  assert traced(jnp.int32(step)) == expected


def test_loss_is_the_faded_mean_distance():
  images = jnp.zeros((2, 2, 2, 3))
  reconstruction = jnp.ones((2, 2, 2, 3)).at[1].set(2.0)
  loss, mean = perceptual.perceptual_loss(
    distance,
    {'scale': jnp.float32(3.0)},
    images,
    reconstruction,
    step=1,
    warmup_steps=4,
  )
  np.testing.assert_allclose(mean, 3 * 12 * 1.5)
  np.testing.assert_allclose(loss, mean / 4)


def test_low_precision_distances_are_averaged_in_float32():
  zeros = jnp.zeros((2, 2, 2, 3))
  loss, mean = perceptual.perceptual_loss(
    lambda params, a, b: jnp.full((2,), 1.0, jnp.bfloat16),
    {},
    zeros,
    zeros,
    step=0,
  )
  assert loss.dtype == mean.dtype == jnp.float32
  assert loss == 0
  assert mean == 1
