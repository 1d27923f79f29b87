"""Autoencoders, from the state dicts of their public classes."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

from selfboottok_jax.pretrained import vae
from tests.golden import fixtures

pytestmark = pytest.mark.golden


def _network(meta):
  if 'ch' in meta:
    channels = tuple(meta['ch'] * factor for factor in meta['ch_mult'])
    return vae.Autoencoder(
      channels, meta['num_res_blocks'], meta['embed_dim'], stem=meta['ch']
    )
  return vae.Autoencoder(
    tuple(meta['block_out_channels']),
    meta['layers_per_block'],
    meta['latent_channels'],
    attend_last=False,
    groups=meta['norm_num_groups'],
  )


def _encoder(network, images):
  """Before the last 1x1 convolution."""
  return network.encoder(images)


def _last(array):
  return np.moveaxis(array, 1, -1)


@pytest.mark.parametrize('name', ['tok07_vavae', 'tok07_sdvae_diffusers'])
def test_every_recorded_array(name):
  recorded = fixtures.load('tokenizer', name)
  network, arrays = _network(recorded.meta), recorded.arrays
  params = vae.read(recorded.weights, network, 'test')

  @functools.partial(jax.jit, static_argnames='method')
  def run(x, method):
    return network.apply({'params': params}, x, method=method)

  image, latent = (_last(arrays[f'in_{x}']) for x in ('image', 'latent'))
  mean, log_variance = run(image, 'encode')
  std = np.exp(0.5 * np.asarray(log_variance))
  divergence = 0.5 * (mean**2 + std**2 - 1 - log_variance)
  actual = {
    'out_encoder_out': jax.jit(network.apply, static_argnames='method')(
      {'params': params}, image, method=_encoder
    ),
    'out_mean': mean,
    'out_logvar': log_variance,
    'out_moments': np.concatenate([mean, log_variance], axis=-1),
    'out_std': std,
    'out_kl': divergence.sum(axis=(1, 2, 3)),
    'out_recon_from_latent': run(latent, 'decode'),
    'out_recon_from_mean': run(mean, 'decode'),
  }
  outputs = {key for key in arrays if key.startswith('out_')}
  assert outputs <= actual.keys()
  for key in outputs:
    expected = arrays[key]
    if expected.ndim == 4:
      expected = _last(expected)
    fixtures.check(name, key, actual[key], expected)


def test_early_hub_files_of_diffusers():
  recorded = fixtures.load('tokenizer', 'tok07_sdvae_diffusers')
  path = fixtures.path('tokenizer', 'tok07_sdvae_diffusers')
  old = safetensors.numpy.load_file(
    path.with_name('tok07_sdvae_diffusers_oldkeys.safetensors')
  )
  network = _network(recorded.meta)
  kept = {
    name: array
    for name, array in recorded.weights.items()
    if '.attentions.' not in name or 'group_norm' in name
  }
  one, other = (
    vae.read(weights, network, 'test')
    for weights in (recorded.weights, kept | old)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)
