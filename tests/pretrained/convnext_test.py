import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import convnext, weight_reader


@pytest.mark.parametrize('name', convnext.NETWORKS)
def test_the_table_tells_the_number_of_parameters(name):
  network = convnext.ConvNext(name)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert round(size / 1e6, 1) == network.published.millions


def test_maps_of_any_size():
  network = convnext.ConvNext('convnext_t', image_size=(64, 96))
  params = jax.eval_shape(network.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((2, 50, 50, 3), jnp.float32)
  seen = jax.eval_shape(network, params, images)
  assert network.grid(50) == (2, 3)
  assert seen.patches.shape == (2, 6, network.dim)
  assert seen.cls.shape == (2, network.dim)


def test_an_import_has_the_shapes_of_random_weights():
  network = convnext.ConvNext('convnext_t')
  reader = weight_reader.Reader({})
  network._assemble(reader)
  arrays = {n: np.zeros(s, np.float32) for n, s in reader.wanted.items()}
  arrays['head.fc.weight'] = np.zeros((1000, 768), np.float32)
  params = network.read(arrays, 'test')
  wanted = jax.eval_shape(network.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
