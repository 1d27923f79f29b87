"""Reconstruction error of pixels: the first term of Eq. (4)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors


def squared_error(
  images: Float[Array, 'b h w c'], reconstruction: Float[Array, 'b h w c']
) -> Float[Array, '']:
  """Mean squared difference over all pixels and channels."""
  return jnp.mean(jnp.square(_difference(images, reconstruction)))


def absolute_error(
  images: Float[Array, 'b h w c'], reconstruction: Float[Array, 'b h w c']
) -> Float[Array, '']:
  """Mean absolute difference over all pixels and channels."""
  return jnp.mean(jnp.abs(_difference(images, reconstruction)))


def _difference(images, reconstruction):
  dtype = jnp.promote_types(reconstruction.dtype, jnp.float32)
  return reconstruction.astype(dtype) - images.astype(dtype)


PIXEL_LOSSES = {'mse': squared_error, 'l1': absolute_error}


def pixel_loss(
  images: Float[Array, 'b h w c'],
  reconstruction: Float[Array, 'b h w c'],
  *,
  kind: str = 'mse',
) -> Float[Array, '']:
  """L_recon of Eq. (4), on images in [-1, 1].

  The reconstruction is not clipped: a value out of range is an error too.

  Args:
    images: what was given.
    reconstruction: what came back.
    kind: a key of PIXEL_LOSSES.

  Returns:
    The loss in float32 or wider; 'mse' is at most 4 for values in [-1, 1].

  Raises:
    ConfigError: `kind` is unknown.
  """
  if kind not in PIXEL_LOSSES:
    raise errors.ConfigError(
      f'pixel loss {kind!r} is unknown; choose one of {sorted(PIXEL_LOSSES)}'
    )
  return PIXEL_LOSSES[kind](images, reconstruction)
