"""Images as users give them, as networks read them and as files hold them.

Networks work on float32 in [-1, 1]; files and metrics on uint8 in 0..255.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, Num, UInt8

from selfboottok_jax import errors, sizes

# What is added to a level before its fraction is dropped.
ROUNDINGS = {'truncate': 0.0, 'round': 0.5}
# 1 / 127.5 as a sum: a level times the first part is exact in float32.
_HIGH = np.float32(257 / 2**15)
_LOW = np.float32(1 / 127.5 - 257 / 2**15)


def to_float(images: Num[Any, '*s']) -> Float[Any, '*s']:
  """Converts uint8 images to float32 in [-1, 1]: p / 127.5 - 1.

  Takes numpy arrays, jax arrays and tracers, and returns the same kind, with
  the same bits: those of the formula in float32, rounded after each operation.
  """
  # Not by a division, which XLA compiles to a product with the reciprocal: 205
  # of the 256 levels would differ in their last bit from those of numpy. This
  # sum rounds to the quotient, with and without fused multiply-adds.
  levels = images.astype(np.float32)
  return levels * _HIGH + levels * _LOW - np.float32(1)


def to_uint8(
  images: Float[Array, '*s'] | Float[np.ndarray, '*s'],
  rounding: str = 'truncate',
) -> UInt8[Array, '*s']:
  """Quantises images in [-1, 1]: clamp((x + 1) / 2, 0, 1) * 255 to uint8.

  'truncate' drops the fraction; 'round' goes to the nearest level, halves up
  (ADM's clamp(127.5 x + 128)). Truncation lies half a level low on average,
  and takes some levels one down when an image went from uint8 to float and
  back, which 'round' never does.
  """
  if rounding not in ROUNDINGS:
    raise errors.UserError(
      f'unknown rounding {rounding!r}; choose one of {", ".join(ROUNDINGS)}'
    )
  x = jnp.asarray(images)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  levels = jnp.clip((x + 1) / 2, 0.0, 1.0) * 255
  return jnp.floor(levels + ROUNDINGS[rounding]).astype(jnp.uint8)


def as_images(images: Any, image_size: sizes.Size) -> Float[Array, 'b h w 3']:
  """Checks images that a user gave, and converts them to float32 in [-1, 1].

  Args:
    images: uint8, or float in [-1, 1]; [b, height, width, 3].
    image_size: the side that is wanted, or (height, width).

  Raises:
    UserError: another shape, type or range. The range is that of the values,
      which are not known while a function is traced (jit, vmap, grad): there
      it is not checked.
  """
  wanted = (*sizes.pair(image_size), 3)
  if np.ndim(images) != 4 or np.shape(images)[1:] != wanted:
    raise errors.UserError(
      f'images of shape {np.shape(images)}; wanted [b, {wanted[0]}, '
      f'{wanted[1]}, 3]; crop and resize them first'
    )
  images = jnp.asarray(images)
  if images.dtype == jnp.uint8:
    return to_float(images)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise errors.UserError(
      f'images of type {images.dtype}; wanted uint8, or float in [-1, 1]'
    )
  known = not isinstance(images, core.Tracer)
  # Not "> 1.001", which would let NaN through.
  if known and images.size and not float(jnp.max(jnp.abs(images))) <= 1.001:
    raise errors.UserError(
      f'float images from {float(images.min()):.3g} to '
      f'{float(images.max()):.3g}; wanted [-1, 1]; give uint8, or rescale'
    )
  return images.astype(jnp.float32)


def as_codes(
  codes: Any, num_tokens: int, token_dim: int
) -> Float[Array, 'b k e']:
  """Checks codes that a user gave; float32, UserError for another shape."""
  codes = jnp.asarray(codes, jnp.float32)
  wanted = (num_tokens, token_dim)
  if codes.ndim != 3 or codes.shape[1:] != wanted:
    raise errors.UserError(
      f'codes of shape {codes.shape}; wanted [b, {wanted[0]}, {wanted[1]}]'
    )
  return codes
