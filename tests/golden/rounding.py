"""Bounds on errors of float32, from the operations that make them.

Each function returns how far two computations of one formula may lie apart,
where both round but in another order. `UNIT` is half of float32's last place
relative to a number; an operation of IEEE arithmetic errs by at most that, a
library's exponential, sine or logarithm by twice that.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

UNIT = 2.0**-24
BFLOAT16_UNIT = 2.0**-8


def sincos(scale, fraction, max_period: float = 1e4):
  """Bounds errors of sin and cos of scale * max_period ** -fraction.

  All is computed in float32.

  The exponent x = fraction * log(max_period) is rounded three times, which
  moves the frequency by 3 x units relative to it; the exponential and the
  product with `scale` add three. Two computations may err to both sides, and a
  sine is as wrong as its angle, besides its own unit on each side.
  """
  x = np.asarray(fraction, np.float64) * np.log(max_period)
  angle = np.abs(np.asarray(scale, np.float64)) * np.exp(-x)
  return 2 * UNIT * (angle * (3 + 3 * x) + 1)


def sums(*lengths: int) -> float:
  """Bounds the relative error of successive sums with these term counts.

  A sum of n terms, random in sign, errs by a random walk of sqrt(n) units
  relative to its size. Those of successive sums add up, at worst, and those of
  two computations too.
  """
  return 2 * UNIT * sum(np.sqrt(n) for n in lengths)


def mean_cosine(width: int, *lengths: int) -> float:
  """Bounds the absolute error of a mean cosine of vectors of `width`.

  Two norms and one product are sums of `width` terms; `lengths` are those of
  the sums that the vectors come from. It does not shrink with the mean itself,
  which is small where cosines of both signs cancel.
  """
  return sums(width, width, width, *lengths)


def transformer(width: int, tokens: int, blocks: int) -> tuple[int, ...]:
  """Lists the term counts of the sums in blocks with a 4 times wider MLP.

  In order: a norm, queries, scores, weighted values and their output; then a
  norm and the two layers of the MLP.
  """
  attention = (width, width, width, tokens, width)
  return blocks * (*attention, width, width, 4 * width)


def moving_average(norm, steps: int):
  """Bounds the error of the distance that a running mean has moved.

  The mean began at parameters of norm `norm` and took `steps` updates.

  A step rounds the shrunken average and the sum, each by a unit relative to a
  parameter, in either computation. Roundings are independent, so their squares
  add up; the triangle inequality makes theirs the error of the norm.
  """
  return np.sqrt(2 * 2 * steps) * UNIT * np.asarray(norm, np.float64)


def narrow_product(expected):
  """Bounds the error of a bfloat16 product whose factor one side pre-rounds.

  Three roundings: the factor's, and the product's on either side.
  """
  return 3 * BFLOAT16_UNIT * np.abs(np.asarray(expected, np.float64))


def vp_sigma(sigma):
  """Bounds the relative error of sigma on SiT's VP path.

  sigma = sqrt(1 - exp(p)): just below 1 the exponential errs by one unit, and
  all of that stays in sigma^2. A time may be rounded by one, by which sigma^2
  moves by less than three. The square root halves the sum; four units are for
  the other operations.
  """
  squared = np.square(np.asarray(sigma, np.float64))
  return UNIT * ((1 + 3) / (2 * squared) + 4)


def cosine_sigma(sigma):
  """Bounds the relative error of sigma = cos(angle), angle up to pi / 2.

  Two roundings move the angle in either computation, and sigma by its slope
  times that; the cosine itself errs by a unit on each side.
  """
  sigma = np.asarray(sigma, np.float64)
  slope = np.sqrt(np.maximum(1 - sigma**2, 0))
  return 2 * UNIT * (2 * (np.pi / 2) * slope / sigma + 1)


def velocity_loss(difference, target_error):
  """Bounds the error of the mean square of `difference`, per sample.

  `target_error` is the absolute error of the target within the difference.

  The square has a slope of 2 |difference|; its mean is a sum of n terms of one
  sign, and each term three roundings.
  """
  difference = np.asarray(difference, np.float64)
  axes = tuple(range(1, difference.ndim))
  slope = np.mean(2 * np.abs(difference) * target_error, axes)
  n = difference[0].size
  return slope + (sums(n) + 6 * UNIT) * np.mean(difference**2, axes)


def tweedie(path: Mapping[str, Any], velocity, data, noise, sigma_error=0.0):
  """Bounds the error of the data that Tweedie's formula gives.

  data = x / alpha + sigma^2 / alpha * score, with the score of SiT.

  Its score is (r v - x) / (sigma^2 - r sigma' sigma), r = alpha / alpha', and
  cancels x / alpha where alpha is small. With w the quotient of sigma^2 by the
  score's denominator, the terms are (1 + w) x / alpha and w r v / alpha; x is a
  sum that may cancel too. Some 8 operations round each, for which stands a
  random walk of 3 units on either side.

  Args:
    path: 'alpha', 'sigma', 'd_alpha' and 'd_sigma', which multiply `data`.
    velocity: the prediction v.
    data: of the state x = alpha data + sigma noise.
    noise: likewise.
    sigma_error: relative error of sigma, of x and of w.
  """
  alpha, sigma, d_alpha, d_sigma = (
    np.asarray(path[k], np.float64)
    for k in ('alpha', 'sigma', 'd_alpha', 'd_sigma')
  )
  r = alpha / d_alpha
  w = np.abs(sigma**2 / (sigma**2 - r * d_sigma * sigma))
  noisy = sigma * np.abs(noise)
  state = alpha * np.abs(data) + noisy
  moved = w * (np.abs(r * velocity) + state)
  sized = 2 * 3 * UNIT * (moved + state) + sigma_error * (2 * moved + noisy)
  return sized / alpha
