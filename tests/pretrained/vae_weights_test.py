import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import vae, vae_weights

NETWORK = vae.Autoencoder((8, 16), 1, 2, groups=4)


def _state_dict():
  """NETWORK's parameters under latent diffusion's names."""
  images = jnp.zeros((1, 4, 4, 3))
  params = NETWORK.init(jax.random.key(0), images)['params']
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = vae_weights._name([entry.key for entry in path])
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
  again = vae_weights.read(arrays, NETWORK, 'test')
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_all_that_does_not_fit_is_in_one_error():
  _, arrays = _state_dict()
  del arrays['quant_conv.bias']
  arrays['loss.logvar'] = np.zeros(())
  arrays['decoder.conv_in.weight'] = np.zeros((3, 3))
  with pytest.raises(errors.WeightsError) as caught:
    vae_weights.read(arrays, NETWORK, 'some.ckpt')
  for words in (
    'some.ckpt',
    'missing: quant_conv.bias',
    'unexpected: loss.logvar',
    'decoder.conv_in.weight is (3, 3)',
  ):
    assert words in str(caught.value)
