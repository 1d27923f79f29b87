"""Resizes images, position tables and patch embeddings in the way of torch.

`jax.image.resize` has one cubic kernel (a = -0.5); torch takes a = -0.75
without antialiasing and -0.5 with it, and networks in use come from either.
Weights are resized in float64, once, on import.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Matrix = Float[np.ndarray, 'new old']


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel, which is 0 from 2 on."""
  x = np.abs(x)
  inner = ((a + 2) * x - (a + 3)) * x * x + 1
  outer = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def resize_matrix(old: int, new: int, *, antialias: bool) -> Matrix:
  """The linear map of torch's bicubic interpolate along one axis.

  Half-pixel centres (align_corners=False). Without antialiasing the kernel
  keeps its width and the border is repeated; with it the kernel widens where
  the image shrinks and is cut off and renormalised at the border.
  """
  scale = old / new
  centres = (np.arange(new) + 0.5) * scale - 0.5
  matrix = np.zeros((new, old))
  if antialias:
    stretch = max(scale, 1.0)
    places = (np.arange(old)[None] - centres[:, None]) / stretch
    weights = _cubic(places, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)
  for row, centre in enumerate(centres):
    taps = int(np.floor(centre)) + np.arange(-1, 3)
    # Taps beyond the border add to those on it.
    weights = _cubic(taps - centre, -0.75)
    np.add.at(matrix[row], np.clip(taps, 0, old - 1), weights)
  return matrix


def resize_positions(
  table: Float[np.ndarray, 'n d'],
  old: tuple[int, int],
  new: tuple[int, int],
  *,
  antialias: bool,
) -> Float[np.ndarray, 'm d']:
  """A raster-ordered table of a grid of `old` rows and columns, for `new`."""
  if old == new:
    return table
  grid = table.reshape(*old, -1).astype(np.float64)
  rows, columns = (
    resize_matrix(a, b, antialias=antialias)
    for a, b in zip(old, new, strict=True)
  )
  resized = np.einsum('ij,kl,jld->ikd', rows, columns, grid)
  return resized.reshape(-1, table.shape[1]).astype(table.dtype)


def resize_patch_kernel(
  kernel: Float[np.ndarray, 'p p c d'], new: int
) -> Float[np.ndarray, 'q q c d']:
  """Patch embedding weights for patches of `new` pixels a side.

  The pseudo-inverse of the resize of a patch: where patches grow, a resized
  patch under the new weights has exactly the embedding of the old one under
  the old weights (FlexiViT, arXiv 2212.08013, Eq. 3).
  """
  old = kernel.shape[0]
  if old == new:
    return kernel
  # Weights read patches through the transpose of the patches' resize.
  inverse = np.linalg.pinv(resize_matrix(old, new, antialias=True).T)
  wide = kernel.astype(np.float64)
  resized = np.einsum('ij,kl,jlcd->ikcd', inverse, inverse, wide)
  return resized.astype(kernel.dtype)


def resize_images(
  images: Float[Array, 'b h w c'],
  size: tuple[int, int],
  *,
  antialias: bool = False,
) -> Float[Array, 'b p q c']:
  """Images of `size` rows and columns; an axis that fits stays untouched."""
  for axis, (old, new) in enumerate(zip(images.shape[1:3], size, strict=True)):
    if old == new:
      continue
    matrix = _cached_matrix(old, new, antialias)
    spec = ('ij,bjwc->biwc', 'ij,bhjc->bhic')[axis]
    images = jnp.einsum(
      spec,
      jnp.asarray(matrix, images.dtype),
      images,
      # Accelerators would round pixels to 8 or 11 bits.
      precision=jax.lax.Precision.HIGHEST,
    )
  return images


@functools.cache
def _cached_matrix(old: int, new: int, antialias: bool) -> Matrix:
  return resize_matrix(old, new, antialias=antialias)
