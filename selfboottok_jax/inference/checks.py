"""What users give, checked at the door: images, codes, labels, indices."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from selfboottok_jax import errors

# The largest number of a sample.
_MOST = 2**31 - 1


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


def as_labels(labels: Any, num_classes: int) -> Int[np.ndarray, ' b']:
  """Classes in int32; UserError for what is no list of classes."""
  given = np.asarray(labels)
  if given.ndim != 1 or not given.size or given.dtype.kind not in 'iu':
    raise errors.UserError(
      f'labels of shape {given.shape} and type {given.dtype}; wanted a list '
      'of one or more integers'
    )
  bad = given[(given < 0) | (given >= num_classes)]
  if bad.size:
    raise errors.UserError(
      f'label {int(bad[0])}; wanted 0 to {num_classes - 1}, the classes that '
      'this generator was trained on'
    )
  return given.astype(np.int32)


def as_indices(indices: Any, count: int) -> Int[np.ndarray, ' b']:
  """Numbers of samples in int32, 0, 1, ... where they are None.

  Raises:
    UserError: other than `count` whole numbers from 0 to 2^31 - 1.
  """
  given = np.arange(count) if indices is None else np.asarray(indices)
  fits = given.shape == (count,) and given.dtype.kind in 'iu'
  if not fits or given.min() < 0 or given.max() > _MOST:
    raise errors.UserError(
      f'indices of shape {given.shape} and type {given.dtype}; wanted {count} '
      f'integers, one for each label, from 0 to {_MOST}'
    )
  return given.astype(np.int32)
