import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.models import aligners
from selfboottok_jax.stages import scaling
from tests import tiny


def _local2d(width, depth, seed):
  model = aligners.Local2D(width, depth, heads=2)
  z = jax.random.normal(jax.random.key(9), (2, 4, 6))
  params = tiny.noise_for(model.init, jax.random.key(seed), z)['params']
  return jax.jit(model.apply), params, z


def test_a_deepened_aligner_is_the_same_function_and_can_learn():
  small, stored, z = _local2d(16, 1, seed=0)
  large, fresh, _ = _local2d(16, 3, seed=1)
  assert scaling.can_deepen(fresh, stored)
  grown = scaling.deepen(fresh, stored)
  before = small({'params': stored}, z)
  np.testing.assert_allclose(large({'params': grown}, z), before, atol=1e-6)
  assert np.abs(large({'params': fresh}, z) - before).max() > 0.1
  gradients = jax.jit(
    jax.grad(lambda p: jnp.sum(jnp.square(large({'params': p}, z))))
  )(grown)
  added = gradients['blocks']['block']['mlp']['down']['kernel'][1:]
  assert bool(jnp.all(jnp.any(added != 0, axis=(1, 2))))


def test_another_width_or_fewer_blocks_cannot_be_deepened():
  _, stored, _ = _local2d(16, 2, seed=0)
  for width, depth in ((32, 3), (16, 2), (16, 1)):
    _, fresh, _ = _local2d(width, depth, seed=1)
    assert not scaling.can_deepen(fresh, stored)
