import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import diffaug

B, H, W = 3, 16, 24
IMAGES = jax.random.uniform(jax.random.key(0), (B, H, W, 3), minval=-1)
OFF, ON = 1.0, 0.0


def _draws(*coins, **changes):
  """Draws that change nothing if they act, but for what is given."""
  neutral = diffaug.Draws(
    coins=jnp.array(coins or (OFF, OFF, OFF)),
    brightness=jnp.full(B, 0.5),
    saturation=jnp.full(B, 0.5),
    contrast=jnp.full(B, 0.5),
    shift=jnp.zeros((B, 2), jnp.int32),
    centre=jnp.zeros((B, 2), jnp.int32),
  )
  return dataclasses.replace(neutral, **changes)


def _augment(draws, strength=diffaug.WEAK, images=IMAGES):
  return np.asarray(
    jax.jit(diffaug.augment, static_argnums=2)(images, draws, strength)
  )


def test_coins_decide_for_the_whole_batch():
  changes = {
    'brightness': jnp.full(B, 0.9),
    'shift': jnp.full((B, 2), 1, jnp.int32),
    'centre': jnp.full((B, 2), 8, jnp.int32),
  }
  images = np.asarray(IMAGES)
  np.testing.assert_array_equal(_augment(_draws(**changes)), images)
  for i in range(3):
    coins = [OFF] * 3
    coins[i] = ON
    result = _augment(_draws(*coins, **changes))
    for image, before in zip(result, images, strict=True):
      assert np.any(image != before), i


@pytest.mark.parametrize(('probability', 'acts'), [(0.3, False), (0.5, True)])
def test_a_coin_acts_up_to_the_probability(probability, acts):
  strength = diffaug.Strength(probability)
  draws = _draws(0.4, OFF, OFF, brightness=jnp.full(B, 0.9))
  changed = np.any(_augment(draws, strength) != np.asarray(IMAGES))
  assert changed == acts


def test_colours_by_hand():
  u = jnp.array([0.1, 0.5, 0.9])
  images = np.asarray(IMAGES)
  along = np.asarray(u)[:, None, None, None]
  bright = _augment(_draws(ON, OFF, OFF, brightness=u))
  np.testing.assert_allclose(bright, images + along - 0.5, atol=1e-6)
  grey = images.mean(-1, keepdims=True)
  saturated = _augment(_draws(ON, OFF, OFF, saturation=u))
  expected = grey + 2 * along * (images - grey)
  np.testing.assert_allclose(saturated, expected, atol=1e-6)
  mean = images.mean((1, 2, 3), keepdims=True)
  contrasted = _augment(_draws(ON, OFF, OFF, contrast=u))
  expected = mean + (along + 0.5) * (images - mean)
  np.testing.assert_allclose(contrasted, expected, atol=1e-6)


def test_moves_rows_and_columns_and_fills_with_grey():
  shift = jnp.array([[2, -3], [0, 1], [-1, 0]])
  moved = _augment(_draws(OFF, ON, OFF, shift=shift))
  images = np.asarray(IMAGES)
  np.testing.assert_array_equal(moved[0, :-2, 3:], images[0, 2:, :-3])
  assert not moved[0, -2:].any()
  assert not moved[0, :, :3].any()
  np.testing.assert_array_equal(moved[1, :, :-1], images[1, :, 1:])
  np.testing.assert_array_equal(moved[2, 1:], images[2, :-1])


@pytest.mark.parametrize(
  ('strength', 'hole'), [(diffaug.WEAK, (3, 5)), (diffaug.STRONG, (8, 12))]
)
def test_cuts_a_hole_that_may_hang_over_the_edge(strength, hole):
  centre = jnp.array([[8, 12], [0, 0], [H - 1, W - 1]])
  alone = dataclasses.replace(strength, probability=0.5)
  cut = _augment(_draws(OFF, OFF, ON, centre=centre), alone)
  gone = np.all(cut == 0, axis=-1)
  np.testing.assert_array_equal(cut[~gone], np.asarray(IMAGES)[~gone])
  rows, columns = gone.any(2), gone.any(1)
  assert gone[0].sum() == hole[0] * hole[1]
  assert (rows[0].sum(), columns[0].sum()) == hole
  assert rows[0, 8]
  assert columns[0, 12]
  assert gone[1, 0, 0]
  assert 0 < gone[1].sum() < gone[0].sum()
  assert gone[2, -1, -1]


def test_draws_are_within_their_ranges_and_reach_the_ends():
  shape = (4000, 16, 24, 3)
  for strength in (diffaug.WEAK, diffaug.STRONG):
    draws = diffaug.draw(jax.random.key(0), shape, strength)
    for colour in (draws.brightness, draws.saturation, draws.contrast):
      assert colour.shape == (4000,)
      assert 0 <= colour.min() < 0.01 < 0.99 < colour.max() < 1
    for axis, side in enumerate(shape[1:3]):
      most = side // 8
      assert set(np.unique(draws.shift[:, axis])) == set(range(-most, most + 1))
      # Even holes: 8 of 16 and 12 of 24 at the strong end.
      end = side + 1 if strength is diffaug.STRONG else side
      assert set(np.unique(draws.centre[:, axis])) == set(range(end))
  # Draws of one thing tell nothing of another's.
  values = (draws.brightness, draws.saturation, draws.contrast)
  values += tuple(draws.shift.T) + tuple(draws.centre.T)
  correlation = np.corrcoef(np.stack(values)) - np.eye(len(values))
  assert np.abs(correlation).max() < 0.08


def test_half_of_the_batches_are_left_alone_by_each():
  keys = jax.random.split(jax.random.key(0), 2000)
  coins = jax.vmap(
    lambda key: diffaug.draw(key, (1, 8, 8, 3), diffaug.WEAK).coins
  )(keys)
  acts = np.asarray(coins <= diffaug.WEAK.probability)
  assert acts.shape == (2000, 3)
  np.testing.assert_allclose(acts.mean(0), 0.5, atol=0.05)
  # Three coins, not one.
  np.testing.assert_allclose(acts.all(1).mean(), 0.125, atol=0.03)


def test_gradient_is_that_of_finite_differences():
  draws = diffaug.draw(jax.random.key(1), IMAGES.shape, diffaug.STRONG)
  weights = jax.random.normal(jax.random.key(2), IMAGES.shape)

  def loss(x):
    return jnp.sum(weights * diffaug.augment(x, draws, diffaug.STRONG))

  direction = jax.random.normal(jax.random.key(3), IMAGES.shape)
  slope = jnp.sum(jax.grad(loss)(IMAGES) * direction)
  # The augmentation is affine: any step is exact.
  rise = loss(IMAGES + direction) - loss(IMAGES)
  np.testing.assert_allclose(slope, rise, rtol=1e-4)
  assert abs(slope) > 1


def test_keeps_the_type():
  draws = diffaug.draw(jax.random.key(1), IMAGES.shape, diffaug.STRONG)
  low = _augment(draws, diffaug.STRONG, IMAGES.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  full = _augment(draws, diffaug.STRONG)
  assert full.dtype == np.float32
  np.testing.assert_allclose(low.astype(np.float32), full, atol=0.1)
