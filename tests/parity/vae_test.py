"""SD-VAE beside diffusers' AutoencoderKL, on random weights.

VA-VAE comes in no package: its recorded run is tests/golden/vae_test.py's.
"""

import diffusers
import jax
import numpy as np
import pytest
import torch

from selfboottok_jax.pretrained import vae
from tests.parity import public

CHANNELS, BLOCKS, LATENT, GROUPS = (16, 32, 48), 2, 4, 8
NETWORK = vae.Autoencoder(
  CHANNELS, BLOCKS, LATENT, attend_last=False, groups=GROUPS
)


@pytest.fixture(scope='module')
def model():
  levels = len(CHANNELS)
  network = diffusers.AutoencoderKL(
    down_block_types=('DownEncoderBlock2D',) * levels,
    up_block_types=('UpDecoderBlock2D',) * levels,
    block_out_channels=CHANNELS,
    layers_per_block=BLOCKS,
    latent_channels=LATENT,
    norm_num_groups=GROUPS,
  )
  return public.randomise(network)


def _ours(arrays, images, network=NETWORK):
  """Mean and log variance, and the mean decoded."""
  params = vae.read(arrays, network, 'test')

  @jax.jit
  def run(x):
    mean, log_variance = network.apply({'params': params}, x, method='encode')
    decoded = network.apply({'params': params}, mean, method='decode')
    return mean, log_variance, decoded

  return run(images)


def _theirs(model, images):
  with torch.no_grad():
    posterior = model.encode(public.to_torch(images)).latent_dist
    decoded = model.decode(posterior.mean).sample
  return posterior.mean, posterior.logvar, decoded


@pytest.mark.parametrize('size', [(32, 32), (24, 40)])
def test_tiny(model, size):
  images = public.images(2, *size)
  ours = _ours(public.state_dict(model), images)
  names = 'mean', 'log variance', 'decoded'
  for name, actual, expected in zip(
    names, ours, _theirs(model, images), strict=True
  ):
    public.check(actual, expected, name)


@pytest.mark.parametrize('mistake', ['attention', 'groups', 'epsilon'])
def test_a_mistake_would_be_seen(model, mistake, monkeypatch):
  arrays, network = public.state_dict(model), NETWORK
  if mistake == 'attention':
    arrays = {
      name: np.zeros_like(array) if '.to_q.' in name else array
      for name, array in arrays.items()
    }
  if mistake == 'groups':
    network = network.clone(groups=GROUPS // 2)
  if mistake == 'epsilon':
    monkeypatch.setattr(vae, '_EPSILON', 1e-5)
  images = public.images(2, 32, 32)
  decoded = _ours(arrays, images, network)[-1]
  error = public.relative_error(decoded, _theirs(model, images)[-1])
  assert error > 5 * public.TOLERANCE
