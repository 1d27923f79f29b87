import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import vision
from tests import tiny

IMAGES = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)
PUBLISHED = [name for name, v in vision.TEACHERS.items() if v.published]
TINY = [name for name, v in vision.TEACHERS.items() if not v.published]


def _abstract(network):
  return jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_table_tells_the_number_of_parameters(name):
  family = vision.TEACHERS[name].family
  network = vision.build(name, family.grid, family.patch_size)
  size = sum(leaf.size for leaf in jax.tree.leaves(_abstract(network)))
  assert round(size / 1e6, 1) == network.published.millions


@pytest.mark.parametrize('name', PUBLISHED)
def test_any_grid_and_image_size(name):
  network = vision.build(name, grid=4, patch_size=16)
  see = jax.eval_shape(network, _abstract(network), IMAGES)
  assert see.patches.shape == (2, 16, network.dim)
  assert network.grid(256) == (4, 4)
  assert network.shape_key == {'grid': 4, 'patch_size': 16}


@pytest.mark.parametrize('name', PUBLISHED)
def test_grids_may_be_rectangles(name):
  network = vision.build(name, grid=(3, 5), patch_size=16)
  see = jax.eval_shape(network, _abstract(network), IMAGES)
  assert see.patches.shape == (2, 15, network.dim)
  assert network.grid((48, 80)) == (3, 5)
  # As launch.convert takes it.
  assert network.shape_key == {'grid': '3x5', 'patch_size': 16}


@pytest.mark.parametrize('name', TINY)
def test_images_are_resized_and_normalised_as_in_its_training(name):
  network = vision.build(name, grid=2)
  params = tiny.noise_for(network.init, jax.random.key(1))
  side = 2 * network.vit.patch_size
  images = jax.random.uniform(jax.random.key(2), (2, side, side, 3))
  mean, deviation = (np.array(s) for s in network.family.statistics)
  normal = ((np.asarray(images) + 1) / 2 - mean) / deviation
  direct = network.vit.apply({'params': params}, jnp.asarray(normal))
  seen = jax.jit(network)(params, images)
  np.testing.assert_allclose(seen.patches, direct.patches, atol=2e-5)
  assert (seen.cls is None) == (name == 'ijepa_tiny')
  # Twice the size, every pixel four times: the resize finds them again.
  larger = jnp.repeat(jnp.repeat(images, 3, axis=1), 3, axis=2)
  again = jax.jit(network)(params, larger)
  np.testing.assert_allclose(again.patches, direct.patches, atol=2e-5)


def test_blocks_of_a_random_network_count():
  network = vision.build('dinov2_tiny', grid=2)
  params = tiny.noise_for(network.init, jax.random.key(1))
  without = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * (path[-1].key not in ('scale1', 'scale2')), params
  )
  one, other = (jax.jit(network)(p, IMAGES).patches for p in (params, without))
  assert float(jnp.abs(one - other).mean()) > 0.1


def test_the_computation_may_be_in_16_bits():
  network = vision.build('siglip2_tiny', grid=2)
  params = tiny.noise_for(network.init, jax.random.key(1))
  half = vision.build('siglip2_tiny', grid=2, dtype='bfloat16')
  one, other = (jax.jit(n)(params, IMAGES) for n in (network, half))
  assert other.patches.dtype == other.cls.dtype == jnp.float32
  error = jnp.abs(one.patches - other.patches).max()
  assert 0 < error < 0.1


def test_parameters_are_no_part_of_the_network():
  network = vision.build('dinov2_tiny')
  assert network.params is None
  loaded = dataclasses.replace(network, params={'a': 1})
  assert loaded.params == {'a': 1}
