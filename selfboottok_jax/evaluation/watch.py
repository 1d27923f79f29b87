"""Observers of the reconstructions that a training makes at an evaluation.

They measure perceptual distances and the Frechet distance of features beside
PSNR, and draw a picture. All processes compute, and all get the same numbers.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from selfboottok_jax import pixels
from selfboottok_jax.evaluation import frechet, pictures, reconstruction
from selfboottok_jax.pretrained import contract
from selfboottok_jax.training import sharding

# Name of the picture, and of its folder in a workdir.
PICTURES = 'reconstructions'


class Perceptual:
  """The mean distance of images to their reconstructions, both as bytes.

  Its name is that of the distance for LPIPS, and 'distance_NAME' for others.
  """

  def __init__(self, distance: contract.PerceptualDistance, mesh: Mesh):
    """Puts the parameters of the distance on every device."""
    is_lpips = distance.name.startswith('lpips')
    self.name = distance.name if is_lpips else f'distance_{distance.name}'
    everywhere = sharding.replicated(mesh)
    self._params = jax.device_put(distance.params, everywhere)

    def measure(
      params: PyTree, a: UInt8[Array, 'b h w 3'], b: UInt8[Array, 'b h w 3']
    ) -> Float[Array, ' b']:
      return distance(params, pixels.to_float(a), pixels.to_float(b))

    self._measure = jax.jit(measure, out_shardings=everywhere)
    self.begin()

  def begin(self) -> None:
    """Starts with no images."""
    self._total, self._count = 0.0, 0

  def add(self, seen: reconstruction.Seen) -> None:
    """Adds up the distances of a batch."""
    values = self._measure(self._params, seen.original, seen.reconstruction)
    self._total += np.sum(np.asarray(values, np.float64)[seen.mask])
    self._count += int(np.sum(seen.mask))

  def finish(self) -> Iterator[tuple[str, float]]:
    """Yields the mean."""
    yield self.name, float(self._total / self._count)


class Frechet:
  """Frechet distance of reconstructions to the originals of the same images.

  Features of the originals are computed in the first evaluation only.
  """

  def __init__(self, network: contract.FeatureNetwork, mesh: Mesh):
    """Puts the parameters of the network on every device."""
    self.name = f'fd_{network.name}'
    everywhere = sharding.replicated(mesh)
    self._params = jax.device_put(network.params, everywhere)

    def features(
      params: PyTree, images: UInt8[Array, 'b h w 3']
    ) -> Float[Array, 'b d']:
      return network(params, pixels.to_float(images)).pooled

    self._features = jax.jit(features, out_shardings=everywhere)
    self._real: frechet.Gaussian | None = None
    self.begin()

  def begin(self) -> None:
    """Starts with no images."""
    self._original = frechet.Moments()
    self._made = frechet.Moments()

  def add(self, seen: reconstruction.Seen) -> None:
    """Adds the features of a batch."""
    made = self._features(self._params, seen.reconstruction)
    self._made.add(np.asarray(made)[seen.mask])
    if self._real is None:
      original = self._features(self._params, seen.original)
      self._original.add(np.asarray(original)[seen.mask])

  def finish(self) -> Iterator[tuple[str, float]]:
    """Yields the distance."""
    if self._real is None:
      self._real = self._original.gaussian()
    made = self._made.gaussian()
    yield self.name, frechet.frechet_distance(made, self._real)


class Grid:
  """A picture of some images: originals above reconstructions.

  A third row has reconstructions of the global tokens alone, if there are
  others and `reconstruction.Reconstruction` leaves them out.
  """

  def __init__(self) -> None:
    """Starts with no images."""
    self.begin()

  def begin(self) -> None:
    """Starts with no images."""
    self._rows: dict[str, Any] = {}

  def add(self, seen: reconstruction.Seen) -> None:
    """Takes images from the first batch that has any."""
    mask = seen.mask[reconstruction.shown_rows(len(seen.mask))]
    if not self._rows and mask.any():
      self._rows = {
        # Not the padding, which is black.
        name: np.asarray(images)[mask]
        for name, images in zip(reconstruction.ROWS, seen.shown, strict=False)
      }

  def finish(self) -> Iterator[tuple[str, UInt8[np.ndarray, 'h w 3']]]:
    """Yields the picture."""
    if self._rows:
      yield PICTURES, pictures.comparison(self._rows)
