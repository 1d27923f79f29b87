import functools

import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.flow import noise


def test_noise_belongs_to_the_sample_not_to_the_batch():
  indices = jnp.arange(100, 108)
  draw = functools.partial(noise.sample_noise, 5, step=2, shapes=(4, 3))
  whole = draw(sample_indices=indices)
  halves = [draw(sample_indices=h) for h in jnp.split(indices, 2)]
  np.testing.assert_array_equal(whole, jnp.concatenate(halves))
  np.testing.assert_array_equal(whole[::-1], draw(sample_indices=indices[::-1]))
  with jax.enable_x64(True):
    wide = draw(sample_indices=jnp.arange(100, 108))
  assert wide.dtype == jnp.float32
  np.testing.assert_array_equal(whole, wide)


def test_noise_is_the_same_on_eight_devices():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  indices = jnp.arange(16)
  draw = jax.jit(lambda i: noise.sample_noise(1, i, 0, (6,)))
  np.testing.assert_array_equal(
    draw(indices), draw(jax.device_put(indices, spec))
  )


def test_no_two_draws_are_alike():
  start, steps = noise.make_noise(0, jnp.arange(3), (500,))
  draws = [start, steps(0), steps(1)]
  draws.append(noise.make_noise(1, jnp.arange(3), (500,))[0])
  rows = np.concatenate(draws)
  np.testing.assert_allclose(np.corrcoef(rows), np.eye(12), atol=0.2)
  assert abs(rows.mean()) < 0.05
  assert abs(rows.std() - 1) < 0.05


def test_leaves_of_a_state_are_independent():
  shapes = {'cls': (4, 3), 'tokens': (4, 3)}
  draw = noise.sample_noise(5, jnp.arange(200), 1, shapes)
  assert {k: v.shape for k, v in draw.items()} == {
    'cls': (200, 4, 3),
    'tokens': (200, 4, 3),
  }
  both = np.corrcoef(np.ravel(draw['cls']), np.ravel(draw['tokens']))
  assert abs(both[0, 1]) < 0.1


def test_labels_belong_to_the_sample():
  whole = noise.sample_labels(3, jnp.arange(5000), 10)
  part = noise.sample_labels(3, jnp.array([7, 4000]), 10)
  np.testing.assert_array_equal(part, whole[jnp.array([7, 4000])])
  counts = np.bincount(whole, minlength=10)
  assert len(counts) == 10
  np.testing.assert_allclose(counts, 500, rtol=0.2)
  assert np.any(noise.sample_labels(4, jnp.arange(5000), 10) != whole)
