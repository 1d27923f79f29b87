import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import latents, vae

IMAGES = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)


@pytest.fixture(scope='module')
def tiny():
  network = latents.build('vavae_tiny', grid=2)
  return network, jax.jit(network.init)(jax.random.key(1))


@pytest.mark.parametrize('name', list(latents.VARIANTS))
def test_patches_are_folded_latents(name):
  network = latents.build(name, grid=3)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  # The decoder is no part of it.
  assert set(shapes['network']) == {'encoder', 'quant'}
  see = jax.eval_shape(network, shapes, IMAGES)
  assert see.patches.shape == (2, 9, network.dim)
  assert network.grid(64) == (3, 3)
  if network.published:
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes['network']))
    assert round(size / 1e6, 1) == network.published.millions


def test_latents_are_normalised_per_channel(tiny):
  network, params = tiny
  plain = np.asarray(jax.jit(network)(params, IMAGES).patches)
  mean, deviation = np.arange(32.0), np.linspace(0.5, 2, 32)
  moved = params | {
    'mean': jnp.asarray(mean, jnp.float32),
    'deviation': jnp.asarray(deviation, jnp.float32),
  }
  np.testing.assert_allclose(
    jax.jit(network)(moved, IMAGES).patches,
    (plain - mean) / deviation,
    rtol=1e-5,
    atol=1e-5,
  )


def test_a_folded_patch_is_row_column_channel():
  variant = latents.Variant({}, 2, None, scale=1.0)
  encoder = vae.Autoencoder((8, 8), 1, 3, groups=4)
  network = latents.Latents('test', encoder, variant, 2)
  params = jax.jit(network.init)(jax.random.key(1))
  images = IMAGES[:, :8, :8]
  mean, _ = encoder.apply(
    {'params': params['network']}, images, method='encode'
  )
  assert mean.shape == (2, 4, 4, 3)
  patches = network(params, images).patches
  np.testing.assert_allclose(
    patches[:, 1], mean[:, :2, 2:].reshape(2, 12), atol=1e-5
  )


def test_16_bits_are_near(tiny):
  network, params = tiny
  half = latents.build('vavae_tiny', grid=2, dtype='bfloat16')
  one, other = (jax.jit(n)(params, IMAGES).patches for n in (network, half))
  assert other.dtype == jnp.float32
  assert 0 < float(jnp.abs(one - other).max()) < 0.1 * float(jnp.std(one) + 1)


def test_what_decodes_has_the_decoder_and_undoes_the_normalisation():
  network = latents.build('vavae_tiny', grid=2, decodes=True)
  params = jax.jit(network.init)(jax.random.key(1))
  params['mean'] = jnp.arange(32.0)
  params['deviation'] = jnp.linspace(0.5, 2, 32)
  patches = jax.jit(network)(params, IMAGES).patches
  images = jax.jit(network.decode)(params, patches)
  direct = jax.jit(network.autoencoder.apply)(
    {'params': params['network']}, IMAGES
  )
  assert images.shape == IMAGES.shape
  np.testing.assert_allclose(images, direct, atol=1e-4)


def test_what_does_not_decode_says_so(tiny):
  network, params = tiny
  with pytest.raises(ValueError, match='decodes=True'):
    network.decode(params, jnp.zeros((1, 4, 32)))


@pytest.mark.parametrize(
  ('arrays', 'said'),
  [
    ({}, "'mean' of each of its 32 channels, got none"),
    ({'mean': np.zeros((1, 31, 1, 1))}, 'got shape (1, 31, 1, 1)'),
    ({'mean': np.zeros(32), 'std': np.zeros(32)}, 'must be above 0'),
  ],
)
def test_statistics_that_are_missing_or_wrong(tiny, arrays, said):
  network, _ = tiny
  with pytest.raises(errors.WeightsError) as caught:
    network.read(dict(arrays), 'a/folder')
  assert said in str(caught.value)
  assert 'a/folder' in str(caught.value)
