import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, trees
from selfboottok_jax.pretrained import vae
from tests import tiny

# The published networks, and their sizes in millions.
PUBLISHED = {
  'vavae': (vae.Autoencoder((128, 128, 256, 256, 512)), 16, 69.8),
  'sdvae': (
    vae.Autoencoder((128, 256, 512, 512), latent_dim=4, attend_last=False),
    8,
    83.7,
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_sizes_of_the_published_networks(name):
  network, stride, millions = PUBLISHED[name]
  assert network.stride == stride
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)
  count = trees.count(shapes['params']) / 1e6
  np.testing.assert_allclose(count, millions, rtol=0.01)
  mean, log_variance = jax.eval_shape(
    lambda p, x: network.apply(p, x, method='encode'), shapes, image
  )
  side = 64 // stride
  wanted = (1, side, side, network.latent_dim)
  assert mean.shape == log_variance.shape == wanted
  again = jax.eval_shape(network.apply, shapes, image)
  assert again.shape == (1, 64, 64, 3)


def test_log_variance_is_bounded():
  network = vae.Autoencoder((8, 8), 1, 2, groups=4)
  image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  params = tiny.noise_for(network.init, jax.random.key(1), image)
  far = jax.tree.map(lambda leaf: 1e3 * leaf, params)
  _, log_variance = network.apply(far, image, method='encode')
  assert -30 <= float(log_variance.min()) <= float(log_variance.max()) <= 20


NETWORK = vae.Autoencoder((8, 16), 1, 2, groups=4)


def _state_dict():
  """NETWORK's parameters under latent diffusion's names."""
  images = jnp.zeros((1, 4, 4, 3))
  params = tiny.noise_for(NETWORK.init, jax.random.key(0), images)['params']
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = vae._name([entry.key for entry in path])
    array = np.asarray(leaf)
    if array.ndim == 4:
      array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
      array = array.T
    arrays[name] = array
  return params, arrays


def test_there_and_back():
  params, arrays = _state_dict()
  assert 'encoder.down.0.downsample.conv.weight' in arrays
  assert 'decoder.up.1.attn.0.proj_out.bias' in arrays
  again = vae.read(arrays, NETWORK, 'test')
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_all_that_does_not_fit_is_in_one_error():
  _, arrays = _state_dict()
  del arrays['quant_conv.bias']
  arrays['loss.logvar'] = np.zeros(())
  arrays['decoder.conv_in.weight'] = np.zeros((3, 3))
  with pytest.raises(errors.WeightsError) as caught:
    vae.read(arrays, NETWORK, 'some.ckpt')
  for words in (
    'some.ckpt',
    'missing: quant_conv.bias',
    'unexpected: loss.logvar',
    'decoder.conv_in.weight is (3, 3)',
  ):
    assert words in str(caught.value)
