"""Resizes images, and what a transformer learnt for another grid, as torch.

`jax.image.resize` has one cubic kernel (a = -0.5); torch takes a = -0.75
without antialiasing and -0.5 with it, and networks in use come from either.
Weights are resized in float64, once, when they are imported.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Matrix = Float[np.ndarray, 'new old']


def _cubic(a: float):
  def kernel(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))

  return kernel


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0.0)


# (kernel without antialiasing, kernel with it, its radius)
KERNELS = {
  'bicubic': (_cubic(-0.75), _cubic(-0.5), 2),
  'bilinear': (_triangle, _triangle, 1),
}


def resize_matrix(
  old: int, new: int, kind: str = 'bicubic', *, antialias: bool
) -> Matrix:
  """The linear map of torch's interpolate along one axis.

  Half-pixel centres (align_corners=False). Without antialiasing the kernel
  keeps its width and the border is repeated; with it the kernel widens where
  the image shrinks and is cut off and renormalised at the border.
  """
  plain, smooth, radius = KERNELS[kind]
  scale = old / new
  centres = (np.arange(new) + 0.5) * scale - 0.5
  matrix = np.zeros((new, old))
  if antialias:
    stretch = max(scale, 1.0)
    weights = smooth((np.arange(old)[None] - centres[:, None]) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)
  for row, centre in enumerate(centres):
    first = int(np.floor(centre)) - radius + 1
    taps = np.arange(first, first + 2 * radius)
    np.add.at(matrix[row], np.clip(taps, 0, old - 1), plain(taps - centre))
  return matrix


def resize_positions(
  table: Float[np.ndarray, 'n d'],
  old: tuple[int, int],
  new: tuple[int, int],
  kind: str = 'bicubic',
  *,
  antialias: bool,
) -> Float[np.ndarray, 'm d']:
  """A raster-ordered table of a grid of `old` rows and columns, for `new`."""
  if old == new:
    return table
  grid = table.reshape(*old, -1).astype(np.float64)
  rows, columns = (
    resize_matrix(a, b, kind, antialias=antialias)
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
  kind: str = 'bicubic',
  *,
  antialias: bool = False,
) -> Float[Array, 'b p q c']:
  """Images of `size` rows and columns; those that have it stay untouched."""
  for axis, (old, new) in enumerate(zip(images.shape[1:3], size, strict=True)):
    if old == new:
      continue
    matrix = _cached_matrix(old, new, kind, antialias)
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
def _cached_matrix(old: int, new: int, kind: str, antialias: bool) -> Matrix:
  return resize_matrix(old, new, kind, antialias=antialias)
