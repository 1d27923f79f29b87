"""A released 2D autoencoder in the place of a tokenizer: SD-VAE, VA-VAE.

So that the baselines with 256 patches can be trained, and released generators
judged, by the same commands.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from selfboottok_jax import errors, pixels, pretrained
from selfboottok_jax.pretrained import contract, latents

# Pixels to a patch of either: f8 with 2 x 2 latents, f16 with one.
PATCH_SIZE = 16
# What `encode` reads.
_ENCODER = ('encoder', 'quant')


class ImageAutoencoder:
  """A 2D autoencoder with the surface of an `ImageTokenizer`.

  Attributes are those of `ImageTokenizer`; its codes are the posterior mean,
  normalised, in patches of the raster order. `step` is 0. The decoder has no
  part in the fingerprint: those that were only fine-tuned in it, as SD-VAE's,
  are interchangeable.
  """

  def __init__(self, network: latents.Latents):
    """Wraps a network that decodes, with its parameters."""
    self.network, self.params = network, jax.device_put(network.params)
    self.patch_size = PATCH_SIZE
    self.image_size = network.side * PATCH_SIZE
    self.num_tokens, self.token_dim = network.side**2, network.dim
    self.latent_dim = network.autoencoder.latent_dim
    self.image_encoder = codec_of(network)
    name = network.name
    self.fingerprint = fingerprint(name, self.image_size)
    self.step = 0
    self.config: dict[str, Any] = {
      'task': 'autoencoder',
      'network': name,
      'data': {'image_size': self.image_size},
    }
    self._encode = jax.jit(self.image_encoder.encode)
    self._decode = jax.jit(self.decode_with)

  def encode(
    self, images: Num[Array, 'b h w 3'] | Num[np.ndarray, 'b h w 3']
  ) -> Float[Array, 'b k e']:
    """Codes of images, uint8 or float in [-1, 1]."""
    images = pixels.as_images(images, self.image_size)
    return self._encode(self.image_encoder.params, images)

  def decode(
    self, codes: Float[Array, 'b k e'] | Float[np.ndarray, 'b k e']
  ) -> Float[Array, 'b h w 3']:
    """Images in [-1, 1] from codes."""
    codes = pixels.as_codes(codes, self.num_tokens, self.token_dim)
    return jnp.clip(self._decode(self.params, codes), -1.0, 1.0)

  def decode_with(
    self, params: PyTree, codes: Float[Array, 'b k e']
  ) -> Float[Array, 'b h w 3']:
    """Images around [-1, 1], by parameters like `params`; traceable."""
    return self.network.decode(params, codes)


def is_autoencoder(spec: str) -> bool:
  """Whether a spec names an autoencoder, and no workdir."""
  return spec.partition(':')[0] in latents.VARIANTS


def load_autoencoder(spec: str, image_size: int = 256) -> ImageAutoencoder:
  """Loads an autoencoder, for images of a size.

  Args:
    spec: 'NAME', 'NAME:SOURCE' or 'NAME:random', see `pretrained`.
    image_size: side of the images, a multiple of 16.

  Raises:
    UserError: an unknown name or another size.
    WeightsError: see `pretrained.store.load`.
  """
  return ImageAutoencoder(load_network(spec, image_size))


def load_network(
  spec: str, image_size: int, *, abstract: bool = False
) -> latents.Latents:
  """The network of `load_autoencoder` alone; `abstract`: of shapes alone."""
  if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
    raise errors.UserError(
      f'image_size={image_size} with {spec}; wanted a multiple of {PATCH_SIZE}'
    )
  return pretrained.load_network(
    spec, grid=image_size // PATCH_SIZE, decodes=True, abstract=abstract
  )


def codec_of(network: latents.Latents) -> contract.ImageEncoder:
  """The encoding half of an autoencoder."""
  parts = {name: network.params['network'][name] for name in _ENCODER}
  return contract.ImageEncoder(
    lambda params, images: network(params, images).patches,
    {**network.params, 'network': parts},
    network.side**2,
    network.dim,
    network.side * PATCH_SIZE,
    positions='2d',
  )


def fingerprint(name: str, image_size: int) -> str:
  """Of all that `encode` depends on, as published."""
  told = json.dumps({'autoencoder': name, 'image_size': image_size})
  return hashlib.sha256(told.encode()).hexdigest()
