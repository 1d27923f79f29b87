import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax import inference
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import denoising
from selfboottok_jax.models import sit
from tests import tiny

K, E, CHANNELS, CLASSES = 4, 6, 3, 5
MODEL = sit.SiT(K, E, CLASSES, width=8, depth=1, heads=2, cls_dim=3)
PARAMS = tiny.awake(
  MODEL.init(
    jax.random.key(0),
    jnp.zeros((1, K, E)),
    jnp.zeros(1),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 3)),
  )['params']
)
LATENTS = {'mean': jnp.zeros(E), 'std': jnp.ones(E)}


def _codes(scales=(3.0, 3.0), latents=LATENTS, **settings):
  # One step: what a channel is guided by shows in that channel alone.
  sampling = inference.Sampling(
    sampler='ode', num_steps=1, guidance_high=1.0, **settings
  )
  return denoising.make_codes(
    MODEL,
    sampling,
    PARAMS,
    latents,
    jnp.array([1, 4]),
    jnp.array([0, 7]),
    jnp.uint32(3),
    jnp.array(scales),
    sampling.interval,
    path=path_lib.PATHS['linear'],
    latent_dim=CHANNELS,
  )


def test_the_first_channels_of_every_latent_are_guided():
  plain, every = _codes((1.0, 1.0)), _codes()
  some = _codes(guided_channels=2)
  guided = np.arange(E) % CHANNELS < 2
  np.testing.assert_allclose(some[..., guided], every[..., guided], rtol=1e-5)
  np.testing.assert_allclose(some[..., ~guided], plain[..., ~guided], rtol=1e-5)
  assert np.abs(every - plain).max(axis=(0, 1)).min() > 1e-4


def test_codes_have_the_statistics_undone():
  shifted = {'mean': jnp.full(E, 2.0), 'std': jnp.full(E, 3.0)}
  np.testing.assert_allclose(
    _codes(latents=shifted), 3 * _codes() + 2, rtol=1e-5, atol=1e-5
  )


def test_without_guidance_the_scales_are_not_read():
  np.testing.assert_array_equal(
    _codes((5.0, 5.0), guidance_scale=1.0),
    _codes((2.0, 2.0), guidance_scale=1.0),
  )
