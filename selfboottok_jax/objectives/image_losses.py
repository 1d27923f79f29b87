"""Losses between images and reconstructions: the first two terms of Eq. (4)."""

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

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
    images: the originals.
    reconstruction: the model's output for them.
    kind: a key of PIXEL_LOSSES.

  Returns:
    The loss in float32 or wider; 'mse' is at most 4 for values in [-1, 1].

  Raises:
    ConfigError: `kind` is unknown.
  """
  errors.require_choice('loss.pixel_kind', kind, PIXEL_LOSSES)
  return PIXEL_LOSSES[kind](images, reconstruction)


def warm_up(step: int | Int[Array, ''], warmup_steps: int) -> Float[Array, '']:
  """Rises linearly from 0 at step 0 to 1 at `warmup_steps`; 1 without any."""
  if warmup_steps <= 0:
    return jnp.float32(1.0)
  return jnp.minimum(jnp.asarray(step, jnp.float32) / warmup_steps, 1.0)


def perceptual_loss(
  distance: Callable[..., Float[Array, ' b']],
  params: PyTree,
  images: Float[Array, 'b h w c'],
  reconstruction: Float[Array, 'b h w c'],
) -> Float[Array, '']:
  """L_percep of Eq. (4), without lambda_1 and its warm-up.

  Args:
    distance: `distance(params, a, b)`, one distance per image pair; frozen.
    params: parameters of `distance`: an argument, so that they can be sharded
      and need not be saved.
    images: the originals, in [-1, 1].
    reconstruction: the model's output for them.

  Returns:
    The mean distance.
  """
  values = distance(params, reconstruction, images)
  # A distance map [b, 1, 1, 1] would be averaged without a complaint.
  chex.assert_shape(values, (images.shape[0],))
  return jnp.mean(values.astype(jnp.promote_types(values.dtype, jnp.float32)))


# PSNR of a batch that is reconstructed without an error, in dB.
MOST_PSNR = 100.0


def psnr(
  images: Float[Array, 'b h w c'], reconstruction: Float[Array, 'b h w c']
) -> Float[Array, '']:
  """Mean PSNR in dB of images in [-1, 1]: a diagnostic, not a loss.

  The reconstruction is clipped and not rounded to bytes, so that the value is
  within a few hundredths of that of files below 40 dB.
  """
  error = _difference(images, jnp.clip(reconstruction, -1.0, 1.0))
  square = jnp.mean(jnp.square(error), axis=(1, 2, 3))
  # 4 is the squared range of values.
  floor = 4 * 10 ** (-MOST_PSNR / 10)
  return jnp.mean(10 * jnp.log10(4 / jnp.maximum(square, floor)))


def _difference(
  images: Float[Array, 'b h w c'], reconstruction: Float[Array, 'b h w c']
) -> Float[Array, 'b h w c']:
  # A batch of 1 would broadcast against any other, and give a finite loss.
  chex.assert_equal_shape([images, reconstruction])
  dtype = jnp.promote_types(reconstruction.dtype, jnp.float32)
  return reconstruction.astype(dtype) - images.astype(dtype)
