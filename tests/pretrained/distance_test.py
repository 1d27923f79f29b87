import jax.numpy as jnp
import numpy as np

from selfboottok_jax.pretrained import builtin, contract, distance


def test_distance_is_two_minus_two_cosines():
  network = builtin.init_random(patch_size=8, dim=5)
  measure = distance.FeatureDistance(network)
  assert measure.params is network.params
  rng = np.random.default_rng(0)
  a, b = (
    jnp.asarray(rng.uniform(-1, 1, (3, 16, 16, 3)), jnp.float32)
    for _ in range(2)
  )
  u, v = (np.asarray(network(network.params, x).patches) for x in (a, b))
  cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1)
  cosine /= np.linalg.norm(v, axis=-1)
  np.testing.assert_allclose(
    measure(measure.params, a, b), (2 - 2 * cosine).mean(-1), rtol=1e-4
  )
  np.testing.assert_allclose(
    measure(measure.params, a, -a), 4 * np.ones(3), rtol=1e-4
  )


def test_parameters_are_the_argument_not_the_attribute():
  class Constant:
    name, dim, params = 'constant', 2, {'x': 1.0}

    def grid(self, image_size):
      return 1, 1

    def __call__(self, params, images):
      both = jnp.stack(
        [
          params['x'] * images.mean(axis=(1, 2, 3)),
          1 + 0 * images.mean(axis=(1, 2, 3)),
        ],
        -1,
      )
      return contract.Features(both[:, None])

  measure = distance.FeatureDistance(Constant())
  a, b = jnp.ones((1, 4, 4, 3)), -jnp.ones((1, 4, 4, 3))
  np.testing.assert_allclose(measure({'x': 1.0}, a, b), [2.0], rtol=1e-5)
  np.testing.assert_allclose(measure({'x': 0.0}, a, b), [0.0])
