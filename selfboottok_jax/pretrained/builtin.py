"""Feature networks and a perceptual distance that need no weight file.

They stand in for the pretrained teachers: `hog` for those that know structure
(DINOv2, I-JEPA) and for LPIPS' backbone, `dct` for the VA-VAE whose latents
are the marginal of Eq. (12)-(13), `random` for tests.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors, sizes
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import contract

# Rec. 601 luma; the rows of _OPPONENT are orthonormal: grey, red - blue,
# magenta - green.
_LUMA = np.array([0.299, 0.587, 0.114])
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt(
  [[3], [2], [6]]
)

# Amplitudes of photographs on the scale of [-1, 1], see `dct_amplitudes`.
_CHANNEL_STRENGTH = np.array([1.0, 0.3, 0.15])
_MEAN_STRENGTH, _DETAIL_STRENGTH = 0.8, 0.2

# Gradients (per pixel) and histogram contrast below these count as flat.
_FLAT_GRADIENT, _FLAT_CONTRAST = 1e-3, 0.005

# Squared length below which a patch vector fades out instead of being
# stretched to unit length; keeps the gradient finite at zero.
_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Hog:
  """Oriented gradient histograms and mean colours, smooth in the image.

  A patch is cut into cells x cells cells. A cell gives the mean gradient
  magnitude in each of `bins` unsigned orientations, shared out by a power of
  the cosine so that the bins sum to the magnitude, and its mean colour in
  [-1, 1]. The histograms of a patch are divided by their root mean square
  (plus a floor), so they are of order 1 where there is texture and near 0
  where there is none. After Dalal and Triggs, 2005.

  Attributes:
    patch_size: pixels, a multiple of cells.
    cells: cells along each side of a patch.
    bins: orientations in [0, pi), 2 or more.
  """

  patch_size: int = 16
  cells: int = 2
  bins: int = 8
  params: dict[str, Any] = dataclasses.field(default_factory=dict)
  name: str = 'hog'

  def __post_init__(self) -> None:
    """Refuses sizes that cannot be cut."""
    _require_positive('hog', patch_size=self.patch_size, cells=self.cells)
    if self.bins < 2:
      raise errors.UserError(f'hog: bins={self.bins}, wanted 2 or more')
    if self.patch_size % self.cells:
      raise errors.UserError(
        f'hog: patch_size={self.patch_size} does not divide into '
        f'cells={self.cells}; choose a multiple'
      )

  @property
  def dim(self) -> int:
    """Width of a patch vector: cells^2 * (bins + 3)."""
    return self.cells**2 * (self.bins + 3)

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches of an image."""
    return _grid('hog', *sizes.pair(image_size), self.patch_size)

  def __call__(
    self, params: dict[str, Any], images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Patches [b, n, d] and, as `cls`, their mean."""
    del params
    _, height, width, _ = images.shape
    rows, columns = _grid('hog', height, width, self.patch_size)
    images = _at_least_float32(images)
    luma = _product(images, jnp.asarray(_LUMA, images.dtype))
    energy = orientation_energy(luma, self.bins)
    histograms = self._pool(energy, rows, columns)
    square = jnp.square(histograms).mean(axis=-1, keepdims=True)
    histograms = histograms / jnp.sqrt(square + _FLAT_CONTRAST**2)
    colours = self._pool(images, rows, columns)
    patches = jnp.concatenate([histograms, colours], axis=-1)
    return contract.Features(patches, patches.mean(axis=1))

  def _pool(
    self, x: Float[Array, 'b h w c'], rows: int, columns: int
  ) -> Float[Array, 'b n f']:
    """Means over the cells of each patch."""
    b, c, side = x.shape[0], x.shape[-1], self.patch_size // self.cells
    x = x.reshape(b, rows * self.cells, side, columns * self.cells, side, c)
    return layers.patchify(x.mean(axis=(2, 4)), self.cells)


def orientation_energy(
  luma: Float[Array, 'b h w'], bins: int
) -> Float[Array, 'b h w k']:
  """Gradient magnitude of each pixel, shared out over orientations.

  Bin k takes the share cos(angle - k pi / bins)^(2p), p = bins // 2, divided
  by what these sum to, which is the same at every angle for 2 bins or more.
  Everything is smooth and finite in the image, flat ones included.
  """
  padded = jnp.pad(luma, ((0, 0), (1, 1), (1, 1)), mode='edge')
  down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
  right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
  square = jnp.square(down) + jnp.square(right) + _FLAT_GRADIENT**2
  angle = np.arange(bins) * np.pi / bins
  cos, sin = (
    jnp.asarray(f(angle), luma.dtype)[None, None, None]
    for f in (np.cos, np.sin)
  )
  # The gradient along each orientation, [b, h, w, k].
  along = right[..., None] * cos + down[..., None] * sin
  power = bins // 2
  share = (jnp.square(along) / square[..., None]) ** power
  total = (np.cos(angle) ** (2 * power)).sum()
  return jnp.sqrt(square)[..., None] * share / total


@dataclasses.dataclass(frozen=True, eq=False)
class Dct:
  """Low-frequency DCT-II coefficients of each patch: a 2D VAE stand-in.

  Stands for the VA-VAE latents X of Eq. (12)-(13), the 2D marginal that the
  local tokens are transported to: a linear image of the patch, of about unit
  variance per channel, that keeps what a blurred reconstruction needs. The
  patch goes through an orthonormal opponent-colour and 2D DCT-II transform;
  the `dim` coefficients of largest expected amplitude are kept and divided by
  that amplitude, see `dct_amplitudes`.

  Attributes:
    patch_size: pixels.
    dim: latent channels per patch, at most 3 * patch_size^2.
  """

  patch_size: int = 16
  dim: int = 32
  params: dict[str, Any] = dataclasses.field(default_factory=dict)
  name: str = 'dct'

  def __post_init__(self) -> None:
    """Refuses more channels than there are coefficients."""
    _require_positive('dct', patch_size=self.patch_size, dim=self.dim)
    if self.dim > 3 * self.patch_size**2:
      raise errors.UserError(
        f'dct: dim={self.dim} is more than the {3 * self.patch_size**2} '
        f'coefficients of patch_size={self.patch_size}; lower dim'
      )

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches of an image."""
    return _grid('dct', *sizes.pair(image_size), self.patch_size)

  def __call__(
    self, params: dict[str, Any], images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Latents [b, n, dim]; there is no `cls`."""
    del params
    _, height, width, _ = images.shape
    _grid('dct', height, width, self.patch_size)
    images = _at_least_float32(images)
    basis, amplitudes = dct_basis(self.patch_size, self.dim)
    kernel = jnp.asarray(basis / amplitudes, images.dtype)
    patches = _product(layers.patchify(images, self.patch_size), kernel)
    return contract.Features(patches)


@functools.cache
def dct_basis(
  patch_size: int, dim: int
) -> tuple[Float[np.ndarray, 'f e'], Float[np.ndarray, 'e']]:
  """Orthonormal columns of the first `dim` coefficients, and amplitudes.

  Rows are a patch flattened as (row, column, rgb). Columns descend in
  amplitude; equals go by channel, then along the zigzag.
  """
  place = np.arange(patch_size)
  rows = np.cos(np.pi * (place + 0.5) * place[:, None] / patch_size)
  rows *= np.sqrt(np.where(place[:, None] == 0, 1, 2) / patch_size)
  amplitudes = dct_amplitudes(patch_size)
  channel, down, right = np.indices(amplitudes.shape).reshape(3, -1)
  order = np.lexsort(
    (down, down + right, channel, -amplitudes.ravel().round(9))
  )[:dim]
  channel, down, right = channel[order], down[order], right[order]
  basis = np.einsum(
    'ep,eq,ec->pqce', rows[down], rows[right], _OPPONENT[channel]
  )
  return (
    basis.reshape(-1, dim),
    amplitudes[channel, down, right],
  )


def dct_amplitudes(patch_size: int) -> Float[np.ndarray, '3 p p']:
  """Expected standard deviation of each opponent-colour DCT coefficient.

  The 1/f law of photographs, for images in [-1, 1] and frequency (u, v):
  strength * patch_size * (0.8 at u = v = 0, else 0.2 / sqrt(u^2 + v^2)), with
  strength 1, 0.3, 0.15 for grey, red - blue, magenta - green. The constants
  are rounded means over 400 photographs of 64 and 256 pixels, whose own
  values are within about a factor of 1.7.
  """
  down, right = np.indices((patch_size, patch_size))
  radius = np.hypot(down, right)
  detail = _DETAIL_STRENGTH / np.maximum(radius, 1)
  law = patch_size * np.where(radius == 0, _MEAN_STRENGTH, detail)
  return _CHANNEL_STRENGTH[:, None, None] * law


@dataclasses.dataclass(frozen=True, eq=False)
class RandomPatches:
  """A random linear projection of each patch: a teacher for tests.

  Attributes:
    params: {'kernel': [3 * patch_size^2, dim]}, of unit column norm on
      average; `load_network('random', ...)` draws it from a fixed seed.
  """

  params: dict[str, Any]
  patch_size: int
  dim: int
  name: str = 'random'

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches of an image."""
    return _grid('random', *sizes.pair(image_size), self.patch_size)

  def __call__(
    self, params: dict[str, Any], images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Patches [b, n, dim] and, as `cls`, their mean."""
    _, height, width, _ = images.shape
    _grid('random', height, width, self.patch_size)
    images = _at_least_float32(images)
    kernel = params['kernel'].astype(images.dtype)
    patches = _product(layers.patchify(images, self.patch_size), kernel)
    return contract.Features(patches, patches.mean(axis=1))


def init_random(
  patch_size: int = 16, dim: int = 64, seed: int = 0
) -> RandomPatches:
  """Draws the projection; equal arguments give equal networks."""
  _require_positive('random', patch_size=patch_size, dim=dim)
  fan_in = 3 * patch_size**2
  kernel = jax.random.normal(jax.random.key(seed), (fan_in, dim), jnp.float32)
  params = {'kernel': kernel / np.sqrt(fan_in)}
  return RandomPatches(params=params, patch_size=patch_size, dim=dim)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureDistance:
  """Squared distance of unit-normalised patch features, mean over patches.

  Summed over channels, like a layer of LPIPS: between 0 (equal) and 4
  (opposite in every patch); for vectors of unit length 2 - 2 cosine.

  Attributes:
    network: network whose features are compared.
  """

  network: contract.FeatureNetwork

  @property
  def name(self) -> str:
    """The name of the network."""
    return self.network.name

  @property
  def params(self) -> Any:
    """The parameters of the network."""
    return self.network.params

  def __call__(
    self,
    params: Any,
    a: Float[Array, 'b h w 3'],
    b: Float[Array, 'b h w 3'],
  ) -> Float[Array, 'b']:
    """The distance of each pair of images in [-1, 1]."""
    from_a, from_b = (
      _unit_length(self.network(params, x).patches) for x in (a, b)
    )
    return jnp.square(from_a - from_b).sum(axis=-1).mean(axis=-1)


def _unit_length(x: Float[Array, 'b n d']) -> Float[Array, 'b n d']:
  square = jnp.square(x).sum(axis=-1, keepdims=True)
  return x / jnp.sqrt(square + _FLOOR)


def _grid(
  name: str, height: int, width: int, patch_size: int
) -> tuple[int, int]:
  if height % patch_size or width % patch_size:
    raise errors.UserError(
      f'{name}: {height}x{width} images do not divide into patches of '
      f'{patch_size}; choose a patch_size that divides the image size'
    )
  return height // patch_size, width // patch_size


def _product(a: Float[Array, '*b n d'], b: Float[Array, 'd *e']) -> Array:
  # Accelerators would round the operands to bfloat16 or TF32.
  return jnp.matmul(a, b, precision=layers.precision(a.dtype))


def _at_least_float32(x: Float[Array, '...']) -> Float[Array, '...']:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _require_positive(name: str, **values: int) -> None:
  for key, value in values.items():
    if value < 1:
      raise errors.UserError(f'{name}: {key}={value}, wanted 1 or more')
