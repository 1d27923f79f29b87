"""Images and codes that users give, checked at the door."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors


def as_images(images: Any, image_size: int) -> Float[Array, 'b h w 3']:
  """Uint8, or float in [-1, 1], to float32 in [-1, 1].

  Raises:
    UserError: another shape, type or range.
  """
  wanted = (image_size, image_size, 3)
  if np.ndim(images) != 4 or np.shape(images)[1:] != wanted:
    raise errors.UserError(
      f'images of shape {np.shape(images)}; wanted [b, {wanted[0]}, '
      f'{wanted[1]}, 3]; crop and resize them first'
    )
  images = jnp.asarray(images)
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise errors.UserError(
      f'images of type {images.dtype}; wanted uint8, or float in [-1, 1]'
    )
  # Not "> 1.001": that would let NaN through.
  if images.size and not float(jnp.max(jnp.abs(images))) <= 1.001:
    raise errors.UserError(
      f'float images from {float(images.min()):.3g} to '
      f'{float(images.max()):.3g}; wanted [-1, 1]; give uint8, or rescale'
    )
  return images.astype(jnp.float32)


def as_codes(
  codes: Any,
  num_tokens: int,
  token_dim: int,
) -> Float[Array, 'b k e']:
  """Codes in float32; UserError for another shape."""
  codes = jnp.asarray(codes, jnp.float32)
  wanted = (num_tokens, token_dim)
  if codes.ndim != 3 or codes.shape[1:] != wanted:
    raise errors.UserError(
      f'codes of shape {codes.shape}; wanted [b, {wanted[0]}, {wanted[1]}]'
    )
  return codes
