"""Frechet distance between Gaussian fits of features, in float64.

Reports call it `fd_NETWORK`. FID is the name of one official protocol, with
the pool features of Inception-v3, and its numbers compare with no other.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """A Gaussian fit of `count` features, with sample covariance (n - 1)."""

  mean: Float[np.ndarray, 'd']
  covariance: Float[np.ndarray, 'd d']
  count: int


@dataclasses.dataclass
class Moments:
  """Running mean and scatter (Chan et al., 1983): stable, order-free.

  Attributes:
    count: features so far.
    mean: their mean [d]; None before the first.
    scatter: sum of outer products of deviations [d, d]; None before the first.
  """

  count: int = 0
  mean: Float[np.ndarray, 'd'] | None = None
  scatter: Float[np.ndarray, 'd d'] | None = None

  def add(
    self, features: Float[Array, 'b d'] | Float[np.ndarray, 'b d']
  ) -> None:
    """Adds a batch, without its padding rows."""
    # The distance is a small difference of large traces, which float32 sums
    # over fifty thousand images would drown in round-off.
    features = np.asarray(features, np.float64)
    if not len(features):
      return
    if not np.isfinite(features).all():
      raise errors.DataError(
        'features of an image are not finite numbers, so no Frechet distance '
        'exists; look for NaN in the images'
      )
    mean = features.mean(axis=0)
    centred = features - mean
    self.merge(Moments(len(features), mean, centred.T @ centred))

  def merge(self, other: 'Moments') -> None:
    """Adds the features that another instance has seen."""
    if other.mean is None or other.scatter is None:
      return
    if self.mean is None or self.scatter is None:
      self.count = other.count
      self.mean, self.scatter = other.mean, other.scatter
      return
    total = self.count + other.count
    shift = other.mean - self.mean
    weight = self.count * other.count / total
    between = weight * np.outer(shift, shift)
    # Not in place: `merge` may have adopted these arrays from another instance.
    self.scatter = self.scatter + other.scatter + between
    self.mean = self.mean + shift * (other.count / total)
    self.count = total

  def gaussian(self) -> Gaussian:
    """Returns the fit; raises DataError for fewer than two features."""
    if self.mean is None or self.scatter is None or self.count < 2:
      raise errors.DataError(
        f'a Gaussian fit of {self.count} images; give 2 or more'
      )
    return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def fit(
  batches: Iterable[Float[Array, '_ d'] | Float[np.ndarray, '_ d']],
) -> Gaussian:
  """Fits a Gaussian to batches of features [b, d], which may differ in b."""
  moments = Moments()
  for batch in batches:
    moments.add(batch)
  return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
  """Computes the Frechet distance of two Gaussians.

  With covariances A, B it is |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

  The trace of the root is the sum of the singular values of F^T G for any
  factors A = F F^T and B = G G^T, which is real, non-negative and exact for
  singular covariances too, where the usual `sqrtm` needs an offset or returns
  complex numbers. With fewer images than features (count < d) the covariances
  are singular: the distance is well defined, but biased upwards and falling as
  the count grows, so compare it only at equal counts.
  """
  # Imported where it is used: it takes a tenth of a training's start.
  import scipy.linalg

  if a.mean.shape != b.mean.shape:
    raise errors.UserError(
      f'Frechet distance of {a.mean.size} against {b.mean.size} features; '
      'take both from the same network'
    )
  shift = a.mean - b.mean
  product = _factor(a.covariance).T @ _factor(b.covariance)
  overlap = scipy.linalg.svdvals(product).sum() if product.size else 0.0
  traces = np.trace(a.covariance) + np.trace(b.covariance)
  # Round-off may take the distance of equal fits below zero.
  return max(float(shift @ shift + traces - 2 * overlap), 0.0)


def _factor(
  covariance: Float[np.ndarray, 'd d'],
) -> Float[np.ndarray, 'd r']:
  """Factors a covariance as F F^T, without what is below round-off.

  By a Cholesky decomposition with complete pivoting: that of a singular matrix
  ends with its rank, and takes a tenth of the time of its eigenvectors.
  """
  import scipy.linalg

  count = len(covariance)
  # The usual rank tolerance.
  noise = count * np.finfo(np.float64).eps * covariance.diagonal().max()
  factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(
    covariance, tol=noise, lower=1
  )
  rows = np.empty((count, rank))
  rows[pivots - 1] = np.tril(factor)[:, :rank]
  return rows
