"""2D autoencoders as feature networks: the latents X of Eq. (12) and (13)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import (
  contract,
  published,
  resample,
  vae,
  vae_weights,
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """An autoencoder, and how its latents become patches.

  Attributes:
    fields: of `vae.Autoencoder`.
    fold: latents along each side of a patch.
    published: where its weights are; None where nobody publishes any.
    scale: latents are multiplied by it; None where a file beside the weights
      has the mean and deviation of each channel.
    unused: names in the file, as patterns, that served its training alone.
  """

  fields: Mapping[str, Any]
  fold: int
  published: published.Published | None
  scale: float | None = None
  unused: tuple[str, ...] = ()


_VAVAE = {'channels': (128, 128, 256, 256, 512), 'latent_dim': 32}
_SDVAE = {
  'channels': (128, 256, 512, 512),
  'latent_dim': 4,
  'attend_last': False,
}

VARIANTS: dict[str, Variant] = {
  'vavae': Variant(
    _VAVAE,
    1,
    published.Published(
      'hustvl/vavae-imagenet256-f16d32-dinov2',
      ('vavae-imagenet256-f16d32-dinov2.pt', 'latents_stats.pt'),
      'MIT',
      28.4,
      'optimal transport',
    ),
    unused=('loss.*', 'foundation_model.*', 'linear_proj.*'),
  ),
  'sdvae': Variant(
    _SDVAE,
    2,
    published.Published(
      'stabilityai/sd-vae-ft-ema',
      ('diffusion_pytorch_model.safetensors',),
      'MIT',
      34.2,
      'optimal transport',
    ),
    scale=0.18215,
  ),
  # Of no published weights: to run every code path on a small machine.
  'vavae_tiny': Variant(
    {'channels': (8, 8, 16, 16, 16), 'latent_dim': 32, 'groups': 4}, 1, None
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
  """Posterior means of an autoencoder, of about unit variance per channel.

  Attributes:
    name: one of VARIANTS.
    autoencoder: encodes, and decodes if wanted.
    variant: how latents are normalised and folded into patches.
    side: rows (and columns) of patches; images are resized to fit, bicubic.
    decodes: whether the decoder's parameters are kept.
    params: 'network' (of the autoencoder), 'mean' and 'deviation' (of each
      latent channel); None until they are loaded.
  """

  name: str
  autoencoder: vae.Autoencoder
  variant: Variant
  side: int
  decodes: bool = False
  params: Any = None

  @property
  def published(self) -> published.Published | None:
    """Where the weights are."""
    return self.variant.published

  @property
  def dim(self) -> int:
    """Width of a patch vector."""
    return self.variant.fold**2 * self.autoencoder.latent_dim

  @property
  def shape_key(self) -> dict[str, Any]:
    """What the parameters depend on besides the file."""
    return {'decodes': self.decodes}

  def grid(self, image_size: int) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return self.side, self.side

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Normalised latents of images in [-1, 1], as float32; there is no `cls`.

    A patch of several latents is flattened as (row, column, channel).
    """
    size = self.side * self.variant.fold * self.autoencoder.stride
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    x = resample.resize_images(x, (size, size))
    mean, _ = self.autoencoder.apply(
      {'params': params['network']}, x, method='encode'
    )
    shift, scale = (
      params[key][None, None, None] for key in ('mean', 'deviation')
    )
    latents = (mean.astype(jnp.float32) - shift) / scale
    return contract.Features(layers.patchify(latents, self.variant.fold))

  def decode(
    self, params: PyTree, patches: Float[Array, 'b n d']
  ) -> Float[Array, 'b h w 3']:
    """Images around [-1, 1] from what a call makes of images.

    Raises:
      ValueError: a network that was built without `decodes`.
    """
    if not self.decodes:
      raise ValueError(f'{self.name} was built without decodes=True')
    latents = layers.unpatchify(patches, self.variant.fold)
    shift, scale = (
      params[key][None, None, None] for key in ('mean', 'deviation')
    )
    return self.autoencoder.apply(
      {'params': params['network']}, latents * scale + shift, method='decode'
    )

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
    """Parameters from a published state dict and its statistics.

    Raises:
      WeightsError: what is missing, unexpected or of another shape.
    """
    arrays = dict(arrays)
    statistics = self._statistics(arrays, source)
    whole = vae_weights.read(
      arrays, self.autoencoder, source, unused=self.variant.unused
    )
    kept = jax.eval_shape(self.init, jax.random.key(0))['network']
    return {'network': {name: whole[name] for name in kept}, **statistics}

  def _statistics(self, arrays, source):
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


def build(
  name: str, grid: int = 16, dtype: str = 'float32', decodes: bool = False
) -> Latents:
  """An autoencoder without its weights.

  Args:
    name: one of VARIANTS.
    grid: rows (and columns) of patches that it returns.
    dtype: of the computation.
    decodes: whether it is to decode too.
  """
  contract.check_options(name, dtype=dtype, grid=grid)
  variant = VARIANTS[name]
  network = vae.Autoencoder(**variant.fields, dtype=dtype)
  return Latents(name, network, variant, grid, decodes)
