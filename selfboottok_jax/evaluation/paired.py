"""Scores of images against their originals, streamed over devices and hosts.

Each image has a score of its own; the result is their mean, summed in float64
on the host, so it depends on neither batches, devices nor processes.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree, UInt8

from selfboottok_jax import errors, pixels, trees
from selfboottok_jax.evaluation import scores
from selfboottok_jax.pretrained import contract
from selfboottok_jax.training import sharding

# Metric, value, and its own part of the protocol.
Measured = tuple[str, float, dict[str, Any]]
PROTOCOLS = {
  'psnr': 'data range 1 on [0, 1], uint8, per image then mean',
  'ssim': '7x7 uniform window, data range 1, per channel then mean',
  'ssim_range2': 'as ssim with data range 2 on [0, 1]: inflated, for '
  'comparison with published tables',
}


class PairedScores:
  """Means of scores of images against their originals."""

  def __init__(
    self,
    metrics: Sequence[str],
    distances: Mapping[str, contract.PerceptualDistance],
    mesh: Mesh,
    random: Collection[str] = (),
  ):
    """Starts with no image.

    Args:
      metrics: names in `scores.SCORES`.
      distances: perceptual distances, by the name of the metric.
      mesh: devices to compute on.
      random: the distances whose weights were drawn at random.
    """
    self._random = frozenset(random)
    self._metrics, self._distances = tuple(metrics), dict(distances)
    self._mesh = mesh
    everywhere = sharding.replicated(mesh)
    self._params = jax.device_put(
      {name: d.params for name, d in self._distances.items()}, everywhere
    )
    self._compute = jax.jit(self._scores, out_shardings=everywhere)
    self._totals: dict[str, float] = {}
    self.count = 0
    self._running: dict[str, Array] | None = None

  def add(self, batch: Mapping[str, Array]) -> None:
    """Adds a batch, split over the mesh.

    Args:
      batch: 'image' and 'original' uint8 [b, h, w, 3]; 'mask' bool [b], False
        for padding.
    """
    with jax.set_mesh(self._mesh):
      running = self._compute(
        self._params, batch['original'], batch['image'], batch['mask']
      )
    # Only now: devices compute while the host adds up.
    self._absorb()
    self._running = running

  def finish(self) -> list[Measured]:
    """Returns (metric, mean over all images, its part of the protocol).

    Raises:
      DataError: there were no images.
    """
    self._absorb()
    if not self.count:
      raise errors.DataError('no images to score; give one or more')
    return [
      (name, self._totals[name] / self.count, self._protocol(name))
      for name in (*self._metrics, *self._distances)
    ]

  def _scores(
    self,
    params: PyTree,
    original: UInt8[Array, 'b h w 3'],
    image: UInt8[Array, 'b h w 3'],
    mask: Bool[Array, 'b'],
  ) -> dict[str, Array]:
    found = {
      name: scores.SCORES[name](original, image) for name in self._metrics
    }
    a, b = pixels.to_float(original), pixels.to_float(image)
    for name, distance in self._distances.items():
      found[name] = distance(params[name], a, b)
    return {**found, 'mask': mask}

  def _absorb(self) -> None:
    """Adds up the batch that was given to the devices last."""
    if self._running is None:
      return
    found = {n: np.asarray(x) for n, x in self._running.items()}
    self._running = None
    mask = found.pop('mask')
    self.count += int(mask.sum())
    for name, values in found.items():
      # Sums over a large set outgrow the 24 bits of float32.
      own = values[mask].astype(np.float64).sum()
      self._totals[name] = self._totals.get(name, 0.0) + float(own)

  def _protocol(self, name: str) -> dict[str, Any]:
    if name in PROTOCOLS:
      return {'description': PROTOCOLS[name], 'count': self.count}
    distance = self._distances[name]
    return {
      'description': 'on [-1, 1] after uint8, per image then mean',
      'network': distance.name,
      'weights': trees.weights_hash(distance.params),
      'count': self.count,
      **({'warning': 'random weights'} if name in self._random else {}),
    }
