import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, inference
from selfboottok_jax.pretrained import autoencoder, latents
from tests import tiny

SPEC, SIZE = 'vavae_tiny:random', 32


@pytest.fixture(scope='module')
def loaded():
  return inference.load_autoencoder(SPEC, SIZE)


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def test_has_the_surface_of_a_tokenizer(loaded):
  assert loaded.image_size == SIZE
  assert loaded.patch_size == autoencoder.PATCH_SIZE == 16
  assert (loaded.num_tokens, loaded.token_dim) == (4, 32)
  # A token of VA-VAE is one latent.
  assert loaded.latent_dim == 32
  assert loaded.step == 0
  assert loaded.config['task'] == 'autoencoder'
  assert loaded.config['data']['image_size'] == SIZE


def test_codes_are_those_of_the_network(loaded, pictures):
  codes = loaded.encode(pictures)
  assert codes.shape == (3, 4, 32)
  assert codes.dtype == jnp.float32
  scaled = pictures / 127.5 - 1
  seen = loaded.network(loaded.params, jnp.asarray(scaled, jnp.float32))
  np.testing.assert_allclose(codes, seen.patches, atol=1e-5)
  for images in (scaled, jnp.asarray(pictures)):
    np.testing.assert_allclose(loaded.encode(images), codes, atol=1e-5)


def test_images_are_those_of_the_network_and_clipped(loaded, pictures):
  codes = np.asarray(loaded.encode(pictures))
  images = loaded.decode(codes)
  assert images.shape == pictures.shape
  assert images.dtype == jnp.float32
  made = loaded.network.decode(loaded.params, jnp.asarray(codes))
  np.testing.assert_allclose(images, jnp.clip(made, -1, 1), atol=1e-5)
  np.testing.assert_allclose(
    loaded.decode_with(loaded.params, jnp.asarray(codes)), made, atol=1e-5
  )
  far = loaded.decode(1e3 * codes)
  assert np.abs(far).max() <= 1


def test_its_codec_encodes_without_a_decoder(loaded, pictures):
  codec = loaded.codec
  assert codec.positions == '2d'
  assert set(codec.params['network']) == {'encoder', 'quant'}
  assert (codec.num_tokens, codec.token_dim, codec.image_size) == (4, 32, SIZE)
  images = jnp.asarray(pictures / 127.5 - 1, jnp.float32)
  np.testing.assert_allclose(
    jax.jit(codec.encode)(codec.params, images),
    loaded.encode(pictures),
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((1, 16, 16, 3), np.uint8), r'wanted \[b, 32, 32, 3\]'),
    (np.full((1, SIZE, SIZE, 3), 255.0), r'to 255; wanted \[-1, 1\]'),
  ],
)
def test_images_that_cannot_be_encoded(unchecked, loaded, images, message):
  with pytest.raises(errors.UserError, match=message):
    unchecked(loaded.encode, images)


def test_codes_that_cannot_be_decoded(unchecked, loaded):
  with pytest.raises(errors.UserError, match=r'wanted \[b, 4, 32\]'):
    unchecked(loaded.decode, np.zeros((1, 5, 32), np.float32))


@pytest.mark.parametrize('size', [0, 8, 40])
def test_sizes_that_are_no_grid(size):
  with pytest.raises(errors.UserError, match=f'image_size={size}.*multiple of'):
    inference.load_autoencoder(SPEC, size)


def test_the_fingerprint_is_of_the_name_and_the_size(loaded):
  assert loaded.fingerprint == autoencoder.fingerprint('vavae_tiny', SIZE)
  others = {
    autoencoder.fingerprint(name, size)
    for name in latents.VARIANTS
    for size in (256, 512)
  }
  assert len(others) == 2 * len(latents.VARIANTS)
  assert loaded.fingerprint not in others


def test_a_spec_takes_the_place_of_a_workdir():
  assert autoencoder.is_autoencoder('sdvae')
  assert autoencoder.is_autoencoder('vavae:some/folder')
  assert not autoencoder.is_autoencoder('runs/sdvae')
  loaded = inference.load_tokenizer(SPEC)
  assert isinstance(loaded, inference.ImageAutoencoder)
  assert (loaded.image_size, loaded.num_tokens) == (256, 256)


def test_shapes_alone_are_told_without_weights():
  network = autoencoder.load_network('sdvae', 256, abstract=True)
  codec = autoencoder.codec_of(network)
  assert (codec.num_tokens, codec.token_dim) == (256, 16)
  leaves = jax.tree.leaves(network.params)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_the_same_weights_give_the_same_codes(loaded, pictures):
  again = inference.ImageAutoencoder(loaded.network)
  tiny.assert_same(again.params, loaded.params)
  np.testing.assert_array_equal(again.encode(pictures), loaded.encode(pictures))
