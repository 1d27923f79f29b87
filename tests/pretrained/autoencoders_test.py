import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, inference, pretrained
from selfboottok_jax.pretrained import autoencoders, vae
from tests import tiny

IMAGES = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)


@pytest.fixture(scope='module')
def small():
  network = autoencoders.build('vavae_tiny', grid=2)
  return network, _some_params(network)


def _some_params(network):
  """Noise, without statistics of codes that would normalise them."""
  params = tiny.noise_for(network.init, jax.random.key(1))
  plain = {'mean': jnp.zeros_like, 'deviation': jnp.ones_like}
  return params | {
    name: like(params[name]) for name, like in plain.items() if name in params
  }


@pytest.mark.parametrize('name', list(autoencoders.AUTOENCODERS))
def test_patches_are_folded_latents(name):
  network = autoencoders.build(name, grid=3)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  # The decoder is no part of it.
  assert set(shapes['network']) == {'encoder', 'quant'}
  see = jax.eval_shape(network, shapes, IMAGES)
  assert see.patches.shape == (2, 9, network.dim)
  assert network.grid(64) == (3, 3)
  if network.published:
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes['network']))
    assert round(size / 1e6, 1) == network.published.millions


@pytest.mark.parametrize('name', list(autoencoders.AUTOENCODERS))
def test_grids_may_be_rectangles(name):
  network = autoencoders.build(name, grid=(2, 3), decodes=True)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  see = jax.eval_shape(network, shapes, IMAGES)
  assert see.patches.shape == (2, 6, network.dim)
  assert network.grid(64) == (2, 3)
  made = jax.eval_shape(network.decode, shapes, see.patches)
  assert made.shape == (2, 32, 48, 3)


def test_latents_are_normalised_per_channel(small):
  network, params = small
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
  variant = autoencoders.PatchedAutoencoder({}, 2, None, scale=1.0)
  encoder = vae.Autoencoder((8, 8), 1, 3, groups=4)
  network = autoencoders.LatentNetwork('test', encoder, variant, 2)
  params = _some_params(network)
  images = IMAGES[:, :8, :8]
  mean, _ = encoder.apply(
    {'params': params['network']}, images, method='encode'
  )
  assert mean.shape == (2, 4, 4, 3)
  patches = network(params, images).patches
  np.testing.assert_allclose(
    patches[:, 1], mean[:, :2, 2:].reshape(2, 12), atol=1e-5
  )


@pytest.mark.slow
def test_16_bits_are_near(small):
  network, params = small
  half = autoencoders.build('vavae_tiny', grid=2, dtype='bfloat16')
  one, other = (jax.jit(n)(params, IMAGES).patches for n in (network, half))
  assert other.dtype == jnp.float32
  assert 0 < float(jnp.abs(one - other).max()) < 0.1 * float(jnp.std(one) + 1)


@pytest.mark.slow
def test_what_decodes_has_the_decoder_and_undoes_the_normalisation():
  network = autoencoders.build('vavae_tiny', grid=2, decodes=True)
  params = _some_params(network)
  params['mean'] = jnp.arange(32.0)
  params['deviation'] = jnp.linspace(0.5, 2, 32)
  patches = jax.jit(network)(params, IMAGES).patches
  images = jax.jit(network.decode)(params, patches)
  direct = jax.jit(network.autoencoder.apply)(
    {'params': params['network']}, IMAGES
  )
  assert images.shape == IMAGES.shape
  np.testing.assert_allclose(images, direct, atol=1e-4)


def test_what_does_not_decode_says_so(small):
  network, params = small
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
def test_statistics_that_are_missing_or_wrong(small, arrays, said):
  network, _ = small
  with pytest.raises(errors.WeightsError) as caught:
    network.read(dict(arrays), 'a/folder')
  assert said in str(caught.value)
  assert 'a/folder' in str(caught.value)


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
  assert loaded.patch_size == autoencoders.PATCH_SIZE == 16
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
  far = loaded.decode(1e3 * codes, num_groups=1)
  assert np.abs(far).max() <= 1
  # Called as a tokenizer's, which may have three groups.
  with pytest.raises(errors.UserError, match='num_groups=2; wanted None or 1'):
    loaded.decode(codes, num_groups=2)


def test_its_codec_encodes_without_a_decoder(loaded, pictures):
  image_encoder = loaded.image_encoder
  assert image_encoder.positions == '2d'
  assert set(image_encoder.params['network']) == {'encoder', 'quant'}
  assert (
    image_encoder.num_tokens,
    image_encoder.token_dim,
    image_encoder.image_size,
  ) == (4, 32, SIZE)
  images = jnp.asarray(pictures / 127.5 - 1, jnp.float32)
  np.testing.assert_allclose(
    jax.jit(image_encoder.encode)(image_encoder.params, images),
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


def test_rectangles_have_a_grid_of_codes():
  network = pretrained.load_latents('vavae_tiny', (32, 48), abstract=True)
  encoder = autoencoders.encoder_of(network)
  assert (encoder.num_tokens, encoder.image_size) == (6, (32, 48))
  assert encoder.positions == '2x3'
  image = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
  codes = jax.eval_shape(encoder.encode, encoder.params, image)
  assert codes.shape == (1, 6, 32)
  prints = {
    autoencoders.fingerprint('vavae_tiny', size)
    for size in (32, (32, 48), (48, 32))
  }
  assert len(prints) == 3


@pytest.mark.parametrize('size', [0, 8, 40])
def test_sizes_that_are_no_grid(size):
  with pytest.raises(errors.UserError, match=f'image_size={size}.*multiple of'):
    inference.load_autoencoder(SPEC, size)
  with pytest.raises(errors.UserError, match=f'32, {size}.*a multiple of 16'):
    inference.load_autoencoder(SPEC, (32, size))


def test_the_fingerprint_is_of_the_name_and_the_size(loaded):
  assert loaded.fingerprint == autoencoders.fingerprint('vavae_tiny', SIZE)
  others = {
    autoencoders.fingerprint(name, size)
    for name in autoencoders.AUTOENCODERS
    for size in (256, 512)
  }
  assert len(others) == 2 * len(autoencoders.AUTOENCODERS)
  assert loaded.fingerprint not in others


def test_a_spec_takes_the_place_of_a_workdir():
  assert autoencoders.is_autoencoder('sdvae')
  assert autoencoders.is_autoencoder('vavae:some/folder')
  assert not autoencoders.is_autoencoder('runs/sdvae')
  loaded = inference.load_tokenizer(SPEC)
  assert isinstance(loaded, inference.ImageAutoencoder)
  assert (loaded.image_size, loaded.num_tokens) == (256, 256)


def test_shapes_alone_are_told_without_weights():
  network = pretrained.load_latents('sdvae', 256, abstract=True)
  image_encoder = autoencoders.encoder_of(network)
  assert (image_encoder.num_tokens, image_encoder.token_dim) == (256, 16)
  leaves = jax.tree.leaves(network.params)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_the_same_weights_give_the_same_codes(loaded, pictures):
  again = inference.ImageAutoencoder(loaded.network)
  tiny.assert_same(again.params, loaded.params)
  np.testing.assert_array_equal(again.encode(pictures), loaded.encode(pictures))
