"""Inception-v3 as Frechet inception distances are measured with it.

Patches are its last 8 x 8 map, `cls` is pool_3, the 2048 numbers that FID
compares; sFID, the inception score, precision and recall are on `measure`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from selfboottok_jax import errors
from selfboottok_jax.pretrained import (
  contract,
  inception_layers,
  inception_weights,
)
from selfboottok_jax.pretrained import published as published_lib

Params = inception_layers.Params

SIZE = 299
GRID = 8
# Width of the map after a stage to the stage: the usual choices of features.
POOLED_AFTER = {
  64: 'MaxPool_1',
  192: 'MaxPool_2',
  768: 'Mixed_6e',
  2048: 'Mixed_7c',
}
# The graph's `mixed_6/conv`: the first branch of this stage, so the first of
# its channels. sFID takes seven of them, 7 x 17 x 17 = 2023 numbers.
SPATIAL_AFTER, SPATIAL_CHANNELS = 'Mixed_6d', 7


@flax.struct.dataclass
class Measured:
  """What scores are made of; what nobody reads costs nothing under jit.

  Attributes:
    pooled: width (64, 192, 768, 2048) to the spatial mean [b, width].
    spatial: sFID's features, in the order row, column, channel.
    logits_unbiased: without the last bias, as the inception score takes them.
    logits: with it.
    last: the map that pool_3 averages.
    activations: name of each stage to its map.
  """

  pooled: dict[int, Float[Array, 'b _']]
  spatial: Float[Array, 'b 2023']
  logits_unbiased: Float[Array, 'b 1008']
  logits: Float[Array, 'b 1008']
  last: Float[Array, 'b 8 8 2048']
  activations: dict[str, Float[Array, 'b _ _ _']]


@dataclasses.dataclass(frozen=True)
class Resize:
  """How pixels p of 0..255 reach the first layer.

  Attributes:
    centre: where pixel i lies: at i + centre.
    shift: c of (p - c) / s.
    scale: s.
  """

  centre: float
  shift: float
  scale: float


RESIZES = {
  'tf1': Resize(0.0, 128.0, 128.0),
  'half_pixel': Resize(0.5, 127.5, 127.5),
}


def resize_matrix(old: int, centre: float) -> Float[np.ndarray, '299 old']:
  """The bilinear map of a row or column of `old` pixels to SIZE of them."""
  # In float32 as the references: rounding of positions is part of the protocol
  # (at 500 pixels up to 0.008 of 255 levels).
  step, centre = np.float32(old / SIZE), np.float32(centre)
  position = (np.arange(SIZE, dtype=np.float32) + centre) * step - centre
  position = np.maximum(position, 0)
  lower = np.floor(position).astype(int)
  upper = np.minimum(lower + 1, old - 1)
  matrix, rows = np.zeros((SIZE, old), np.float32), np.arange(SIZE)
  matrix[rows, lower] = 1 - (position - lower)
  matrix[rows, upper] += position - lower
  return matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Inception:
  """Inception-v3 with 1008 classes, on images of any size.

  FID is defined on 8-bit pixels. Nothing is rounded here, so that gradients
  pass: who measures quantises first and hands in p / 127.5 - 1.

  Attributes:
    resize: 'tf1' is the protocol of ADM and torch-fidelity: no half-pixel
      centres, (p - 128) / 128. 'half_pixel' is that of pytorch-fid: half-pixel
      centres, p / 127.5 - 1. Neither antialiases, and their FIDs differ.
    name: what reports call it.
    params: name of a layer to its float32 'kernel' and 'bias'; None until they
      are loaded.
  """

  resize: str = 'tf1'
  name: str = 'inception'
  params: Any = None

  def __post_init__(self):
    """Refuses a resize that no branch below knows."""
    if self.resize not in RESIZES:
      raise errors.UserError(
        f'unknown resize {self.resize!r} of {self.name}; choose one of '
        f'{", ".join(RESIZES)}'
      )

  def __call__(
    self, params: Params, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Patches [b, 64, 2048] and pool_3 [b, 2048] of images in [-1, 1]."""
    measured = self.measure(params, images)
    b, rows, columns, d = measured.last.shape
    patches = measured.last.reshape(b, rows * columns, d)
    return contract.Features(patches, measured.pooled[d])

  @property
  def dim(self) -> int:
    """Width of a patch vector, and of `cls`."""
    return inception_layers.POOLED_WIDTH

  @property
  def published(self) -> published_lib.Published:
    """Where the weights are."""
    return inception_weights.PUBLISHED

  @property
  def shape_key(self) -> dict[str, Any]:
    """Parameters depend on the file alone."""
    return {}

  def grid(self, image_size: int) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return GRID, GRID

  def prepare(
    self, images: Float[Array, 'b h w 3']
  ) -> Float[Array, 'b 299 299 3']:
    """What the first layer sees of images in [-1, 1]."""
    how = RESIZES[self.resize]
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    pixels = (x + 1) * 127.5
    rows, columns = (
      jnp.asarray(resize_matrix(side, how.centre), x.dtype)
      for side in x.shape[1:3]
    )
    for equation, matrix in (
      ('ih,bhwc->biwc', rows),
      ('jw,biwc->bijc', columns),
    ):
      pixels = jnp.einsum(
        equation, matrix, pixels, precision=inception_layers.PRECISION
      )
    return (pixels - how.shift) / how.scale

  def measure(
    self, params: Params, images: Float[Array, 'b h w 3']
  ) -> Measured:
    """Everything that scores read, of images in [-1, 1]."""
    maps = dict(inception_layers.run_all(params, self.prepare(images)))
    pooled = {
      width: maps[stage].mean(axis=(1, 2))
      for width, stage in POOLED_AFTER.items()
    }
    last = maps[POOLED_AFTER[self.dim]]
    spatial = maps[SPATIAL_AFTER][..., :SPATIAL_CHANNELS]
    unbiased = jnp.einsum(
      'bd,dv->bv',
      pooled[self.dim],
      params['fc']['kernel'].astype(last.dtype),
      precision=inception_layers.PRECISION,
    )
    return Measured(
      pooled=pooled,
      spatial=spatial.reshape(len(spatial), -1),
      logits_unbiased=unbiased,
      logits=unbiased + params['fc']['bias'].astype(last.dtype)[None],
      last=last,
      activations=maps,
    )

  def init(self, key: PRNGKeyArray) -> Params:
    """Random parameters that keep activations of order 1; traceable."""
    return inception_weights.init(key)

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> Params:
    """Parameters from the published state dict; WeightsError if it differs."""
    return inception_weights.read(arrays, source)


def build(resize: str = 'tf1') -> Inception:
  """The network without its weights; `resize` is one of RESIZES."""
  return Inception(resize)
