"""2D autoencoders: the latents X of Eq. (12) and (13), and tokenizers of them.

`LatentNetwork` is the feature network that optimal transport aims at;
`ImageAutoencoder` puts one (SD-VAE, VA-VAE) in the place of a tokenizer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from selfboottok_jax import errors, pixels, sizes
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import contract, resample, vae


@dataclasses.dataclass(frozen=True)
class PatchedAutoencoder:
  """An autoencoder, and the way from its latents to patches.

  Attributes:
    fields: fields of `vae.Autoencoder`.
    fold: latents along each side of a patch.
    published: place of its weights; None where none is published.
    scale: latents are multiplied by it; None where a file beside the weights
      has the mean and deviation of each channel.
    unused: names in the file, as patterns, that served its training alone.
  """

  fields: Mapping[str, Any]
  fold: int
  published: contract.Published | None
  scale: float | None = None
  unused: tuple[str, ...] = ()


_VAVAE = {'channels': (128, 128, 256, 256, 512), 'latent_dim': 32}
_SDVAE = {
  'channels': (128, 256, 512, 512),
  'latent_dim': 4,
  'attend_last': False,
}

AUTOENCODERS: dict[str, PatchedAutoencoder] = {
  'vavae': PatchedAutoencoder(
    _VAVAE,
    1,
    contract.Published(
      'hustvl/vavae-imagenet256-f16d32-dinov2',
      ('vavae-imagenet256-f16d32-dinov2.pt', 'latents_stats.pt'),
      'MIT',
      28.4,
      'optimal transport',
    ),
    unused=('loss.*', 'foundation_model.*', 'linear_proj.*'),
  ),
  'sdvae': PatchedAutoencoder(
    _SDVAE,
    2,
    contract.Published(
      'stabilityai/sd-vae-ft-ema',
      ('diffusion_pytorch_model.safetensors',),
      'MIT',
      34.2,
      'optimal transport',
    ),
    scale=0.18215,
  ),
  # Nobody publishes it: it runs every code path on a small machine.
  'vavae_tiny': PatchedAutoencoder(
    {'channels': (8, 8, 16, 16, 16), 'latent_dim': 32, 'groups': 4}, 1, None
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentNetwork:
  """Posterior means of an autoencoder, of about unit variance per channel.

  Attributes:
    name: one of AUTOENCODERS.
    autoencoder: encodes, and decodes if wanted.
    variant: normalisation of latents, and their folding into patches.
    side: rows (and columns) of patches, or (rows, columns); images are resized
      to fit, bicubic.
    decodes: True if the decoder's parameters are kept.
    params: 'network' (of the autoencoder), 'mean' and 'deviation' (of each
      latent channel); None until they are loaded.
  """

  name: str
  autoencoder: vae.Autoencoder
  variant: PatchedAutoencoder
  side: sizes.Size
  decodes: bool = False
  params: Any = None

  @property
  def published(self) -> contract.Published | None:
    """Returns the place from which the weights can be downloaded."""
    return self.variant.published

  @property
  def dim(self) -> int:
    """Width of a patch vector."""
    return self.variant.fold**2 * self.autoencoder.latent_dim

  @property
  def shape_key(self) -> dict[str, Any]:
    """Returns the settings that change the parameters made of a file."""
    return {'decodes': self.decodes}

  @property
  def shape(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    return sizes.pair(self.side)

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return self.shape

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Normalised latents of images in [-1, 1], as float32; there is no `cls`.

    A patch of several latents is flattened as (row, column, channel).
    """
    stride = self.variant.fold * self.autoencoder.stride
    rows, columns = (count * stride for count in self.shape)
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    x = resample.resize_images(x, (rows, columns))
    mean, _ = self.autoencoder.apply(
      {'params': params['network']}, x, method='encode'
    )
    shift, scale = _channel_statistics(params)
    latents = (mean.astype(jnp.float32) - shift) / scale
    return contract.Features(layers.patchify(latents, self.variant.fold))

  def decode(
    self, params: PyTree, patches: Float[Array, 'b n d']
  ) -> Float[Array, 'b h w 3']:
    """Decodes patches of latents, as `__call__` returns them, to images.

    Images are around [-1, 1]: nothing clips them.

    Raises:
      ValueError: a network that was built without `decodes`.
    """
    if not self.decodes:
      raise ValueError(f'{self.name} was built without decodes=True')
    latents = layers.unpatchify(patches, self.variant.fold, self.shape)
    shift, scale = _channel_statistics(params)
    images: Any = self.autoencoder.apply(
      {'params': params['network']}, latents * scale + shift, method='decode'
    )
    return images

  def init(self, key: Any) -> PyTree:
    """Random parameters; traceable, so that shapes cost nothing."""
    stride, count = self.autoencoder.stride, self.autoencoder.latent_dim
    network = self.autoencoder.init(
      key,
      jnp.zeros((1, stride, stride, 3)),
      method='__call__' if self.decodes else 'encode',
    )['params']
    return {
      'network': dict(network),
      'mean': jnp.zeros(count),
      'deviation': jnp.ones(count),
    }

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Reads the network's parameters and the mean and deviation of its latents.

    Args:
      arrays: of a published state dict.
      source: its file, for errors.

    Raises:
      WeightsError: what is missing, unexpected or of another shape.
    """
    arrays = dict(arrays)
    statistics = self._statistics(arrays, source)
    whole = vae.read(
      arrays, self.autoencoder, source, unused=self.variant.unused
    )
    kept = jax.eval_shape(self.init, jax.random.key(0))['network']
    return {'network': {name: whole[name] for name in kept}, **statistics}

  def _statistics(
    self, arrays: dict[str, Any], source: str
  ) -> dict[str, np.ndarray]:
    """Mean and deviation of each channel; takes them out of `arrays`."""
    count, scale = self.autoencoder.latent_dim, self.variant.scale
    if scale is not None:
      return {
        'mean': np.zeros(count, np.float32),
        'deviation': np.full(count, 1 / scale, np.float32),
      }
    found = {}
    for ours, theirs in (('mean', 'mean'), ('deviation', 'std')):
      array = arrays.pop(theirs, None)
      if array is None or array.size != count or not np.isfinite(array).all():
        files = (
          self.published.files if self.published else ('latents_stats.pt',)
        )
        what = 'none' if array is None else f'shape {array.shape}'
        raise errors.WeightsError(
          f'{self.name} needs {theirs!r} of each of its {count} channels, got '
          f'{what} in {source}; give a folder with {" and ".join(files)}'
        )
      found[ours] = np.asarray(array, np.float32).reshape(count)
    if not (found['deviation'] > 0).all():
      raise errors.WeightsError(
        f"{source}: 'std' of {self.name} must be above 0 in every channel; "
        'download latents_stats.pt again'
      )
    return found


def _channel_statistics(params: PyTree) -> tuple[Array, Array]:
  """Mean and deviation of latents, broadcastable to [b, i, j, e]."""
  return tuple(params[key][None, None, None] for key in ('mean', 'deviation'))


def build(
  name: str,
  grid: sizes.Size = 16,
  dtype: str = 'float32',
  decodes: bool = False,
) -> LatentNetwork:
  """An autoencoder without its weights.

  Args:
    name: one of AUTOENCODERS.
    grid: rows (and columns) of patches that it returns, or (rows, columns).
    dtype: floating-point type of the computation.
    decodes: True to decode too.
  """
  contract.check_options(name, dtype=dtype, grid=min(sizes.pair(grid)))
  variant = AUTOENCODERS[name]
  network = vae.Autoencoder(**variant.fields, dtype=dtype)
  return LatentNetwork(name, network, variant, grid, decodes)


# Pixels to a side of a patch of either: f8 with 2 x 2 latents, f16 with one.
PATCH_SIZE = 16
# Parts of the network that `encode` reads.
_ENCODER = ('encoder', 'quant')


class ImageAutoencoder:
  """Gives a 2D autoencoder the interface of `ImageTokenizer`.

  With it the baselines with 256 patches are trained, and released generators
  judged, by the same commands. Attributes are those of `ImageTokenizer`; its
  codes are the normalised posterior mean, one for each patch, row by row, and
  `step` is 0. The fingerprint leaves out the decoder: autoencoders that differ
  in it alone, as SD-VAE's two, have one fingerprint.
  """

  def __init__(self, network: LatentNetwork):
    """Wraps a network that decodes, with its parameters."""
    self.network, self.params = network, jax.device_put(network.params)
    self.patch_size = PATCH_SIZE
    self.image_encoder = encoder_of(network)
    self.image_size = self.image_encoder.image_size
    self.num_tokens = self.image_encoder.num_tokens
    self.token_dim = network.dim
    self.latent_dim = network.autoencoder.latent_dim
    self.fingerprint = fingerprint(network.name, self.image_size)
    self.step = 0
    self.config: dict[str, Any] = {
      'task': 'autoencoder',
      'network': network.name,
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
    self,
    codes: Float[Array, 'b k e'] | Float[np.ndarray, 'b k e'],
    *,
    num_groups: int | None = None,
  ) -> Float[Array, 'b h w 3']:
    """Decodes codes to images in [-1, 1]; all codes are one group of tokens.

    Raises:
      UserError: codes of another shape, or `num_groups` that is not 1 or None.
    """
    errors.require(
      num_groups in (None, 1),
      'num_groups',
      num_groups,
      'None or 1: a 2D autoencoder has one group of tokens',
    )
    codes = pixels.as_codes(codes, self.num_tokens, self.token_dim)
    return jnp.clip(self._decode(self.params, codes), -1.0, 1.0)

  def decode_with(
    self, params: PyTree, codes: Float[Array, 'b k e']
  ) -> Float[Array, 'b h w 3']:
    """Decodes with other parameters than the own, unclipped; traceable."""
    return self.network.decode(params, codes)


def encoder_of(network: LatentNetwork) -> contract.ImageEncoder:
  """Returns the encoding half of an autoencoder."""
  parts = {name: network.params['network'][name] for name in _ENCODER}
  rows, columns = network.shape
  image_size = sizes.canonical((rows * PATCH_SIZE, columns * PATCH_SIZE))
  return contract.ImageEncoder(
    lambda params, images: network(params, images).patches,
    {**network.params, 'network': parts},
    rows * columns,
    network.dim,
    image_size,
    positions='2d' if rows == columns else f'{rows}x{columns}',
  )


def fingerprint(name: str, image_size: sizes.Size) -> str:
  """Digest of all that `encode` depends on, as published."""
  text = json.dumps({'autoencoder': name, 'image_size': image_size})
  return hashlib.sha256(text.encode()).hexdigest()


def is_autoencoder(spec: str) -> bool:
  """True if a spec names an autoencoder; False for a workdir."""
  return spec.partition(':')[0] in AUTOENCODERS
