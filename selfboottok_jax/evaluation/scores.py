"""Scores of reconstructions against originals, both uint8.

Each is computed per image and averaged over images afterwards (`add_up`).
Sums over windows and rows are exact integers; only their quotients are float32.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PyTree, UInt8

from selfboottok_jax import errors

# Inside jax.jit the first, outside either.
Images = UInt8[Array, 'b h w 3'] | UInt8[np.ndarray, 'b h w 3']

# PSNR of an image that equals its original, in dB. Without a cap one such image
# would make the mean of all images infinite.
PSNR_CAP = 100.0

SSIM_WINDOW = 7
_K1, _K2 = 0.01, 0.03


def psnr(original: Images, reconstruction: Images) -> Float[Array, 'b']:
  """Peak signal-to-noise ratio in dB, data range 1 on [0, 1].

  At most PSNR_CAP, which equal images get.
  """
  a, b = (jnp.asarray(x).astype(jnp.int32) for x in (original, reconstruction))
  # Integers first: one float32 sum over a whole image loses five digits.
  rows = jnp.square(a - b).sum(axis=(2, 3))
  square = rows.astype(jnp.float32).mean(axis=1) / (a.shape[2] * a.shape[3])
  floor = 255.0**2 * 10 ** (-PSNR_CAP / 10)
  return 10 * jnp.log10(255.0**2 / jnp.maximum(square, floor))


def ssim(original: Images, reconstruction: Images) -> Float[Array, 'b']:
  """Structural similarity, data range 1 on [0, 1].

  The protocol of scikit-image: 7x7 uniform windows, those inside the image
  only, sample covariances, each channel by itself, then the mean.
  """
  return _ssim(original, reconstruction, data_range=255.0)


def ssim_range2(original: Images, reconstruction: Images) -> Float[Array, 'b']:
  """SSIM with data range 2 on [0, 1], for comparing with published tables.

  The convention of LlamaGen, SoftVQ and GigaTok: constants four times too
  large, which inflates the score.
  """
  return _ssim(original, reconstruction, data_range=510.0)


SCORES = {'psnr': psnr, 'ssim': ssim, 'ssim_range2': ssim_range2}


@jax.jit
def image_scores(
  original: Images, reconstruction: Images
) -> dict[str, Float[Array, 'b']]:
  """Computes all of SCORES for each image."""
  return {name: f(original, reconstruction) for name, f in SCORES.items()}


@jax.jit
def baseline_scores(
  original: Images,
  mean: UInt8[Array, 'h w 3'] | UInt8[np.ndarray, 'h w 3'],
) -> dict[str, Float[Array, 'b']]:
  """Computes the PSNR of two reconstructions that need no tokenizer.

  `psnr_mean_image`: one image for all, the mean image of the set.
  `psnr_mean_colour`: each image painted in its own mean colour.
  """
  original = jnp.asarray(original)
  same = jnp.broadcast_to(jnp.asarray(mean)[None], original.shape)
  return {
    'psnr_mean_image': psnr(original, same),
    'psnr_mean_colour': psnr(original, mean_colour(original)),
  }


def mean_colour(images: Images) -> UInt8[Array, 'b h w 3']:
  """Paints each image in its own mean colour, rounded to uint8."""
  images = jnp.asarray(images)
  colour = images.astype(jnp.float32).mean(axis=(1, 2), keepdims=True)
  colour = jnp.floor(colour + 0.5).astype(jnp.uint8)
  return jnp.broadcast_to(colour, images.shape)


@dataclasses.dataclass(frozen=True)
class Score:
  """A measured number and how it was measured.

  Attributes:
    run: name of the run, or of what was measured.
    metric: name of the number; `higher_is_better` knows its direction.
    value: the number.
    protocol: everything that the number depends on, by name, as values of
      JSON: backend, network, weights, count, crop, reference, step,
      parameters, and what else applies.
  """

  run: str
  metric: str
  value: float | int
  protocol: Mapping[str, Any]

  def __post_init__(self) -> None:
    """Refuses a number without its protocol."""
    check_protocol(
      in_words(self.protocol), f'the score {self.metric} of {self.run}'
    )


def in_words(protocol: Mapping[str, Any]) -> str:
  """Describes a protocol in one line, in the order of its keys."""
  # These say what they are about themselves.
  bare = ('description', 'warning')
  return '; '.join(
    f'{value}' if key in bare else f'{key.replace("_", " ")} {value}'
    for key, value in protocol.items()
  )


def higher_is_better(metric: str) -> bool | None:
  """Returns the direction of a metric; None for those that have none.

  Shares of codes, perplexities and the PSNR of trivial baselines have none.
  """
  if metric in ('psnr', 'ssim', 'ssim_range2', 'is', 'precision', 'recall'):
    return True
  is_distance = re.match(r'r?fid$|sfid$|fdr$|fd_|lpips_|distance_', metric)
  return False if is_distance else None


def check_protocol(protocol: str, what: str) -> None:
  """Raises UserError if nothing says how `what` was measured."""
  if not protocol.strip():
    raise errors.UserError(
      f'No protocol was given for {what}; say how it was measured: backend, '
      f'weights, image count, crop, reference set, step, EMA or raw.'
    )


def add_up(parts: Iterable[PyTree]) -> PyTree:
  """Adds up trees of sums over batches, in float64 on the host.

  Sums over a large set outgrow the 24 bits of float32.

  Raises:
    DataError: there are no batches.
  """
  totals = None
  for part in parts:
    part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
    totals = part if totals is None else jax.tree.map(np.add, totals, part)
  if totals is None:
    raise errors.DataError('the mean score of no images; give one or more')
  return totals


def usage(
  histogram: Num[np.ndarray, 'n v'],
) -> tuple[Float[np.ndarray, 'n'], Float[np.ndarray, 'n']]:
  """Computes the fraction of codes used and the perplexity of n codebooks.

  The histogram counts how often (or with what weight) each of the v codes was
  chosen. Perplexity is exp(entropy): v if all are chosen equally often, 1 for a
  single one. Both are 0 for a codebook that was never used.
  """
  histogram = np.asarray(histogram, np.float64)
  total = histogram.sum(axis=1, keepdims=True)
  share = histogram / np.where(total > 0, total, 1)
  entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
  perplexity = np.where(total[:, 0] > 0, np.exp(entropy), 0.0)
  return (histogram > 0).mean(axis=1), perplexity


def _ssim(
  original: Images, reconstruction: Images, data_range: float
) -> Float[Array, 'b']:
  """SSIM of pixels that are still 0 to 255; `data_range` in the same unit."""
  if min(original.shape[1:3]) < SSIM_WINDOW:
    raise errors.UserError(
      f'ssim got {original.shape[1]}x{original.shape[2]} images, wanted '
      f'{SSIM_WINDOW} pixels or more a side'
    )
  a, b = (jnp.asarray(x).astype(jnp.int32) for x in (original, reconstruction))
  n = SSIM_WINDOW**2
  sum_a, sum_b = _window_sums(a), _window_sums(b)
  # n^2 times the covariances: exact, and below 2^31 for uint8.
  var_a = n * _window_sums(a * a) - sum_a * sum_a
  var_b = n * _window_sums(b * b) - sum_b * sum_b
  covariance = n * _window_sums(a * b) - sum_a * sum_b
  sample = 1.0 / (n * (n - 1))
  mean_a, mean_b = sum_a / n, sum_b / n
  c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
  above = (2 * mean_a * mean_b + c1) * (2 * sample * covariance + c2)
  below = (mean_a**2 + mean_b**2 + c1) * (sample * (var_a + var_b) + c2)
  # The mean of what is missing to 1: float32 sums of values near 1 lose digits.
  return 1 - (1 - above / below).mean(axis=(1, 2, 3))


def _window_sums(x: Int[Array, 'b h w c']) -> Int[Array, 'b _ _ c']:
  """Sums over all windows that lie inside the image."""
  rows, columns = (size - SSIM_WINDOW + 1 for size in x.shape[1:3])
  # Separable: 7 + 7 shifted sums in place of 49.
  window = range(SSIM_WINDOW)
  x = functools.reduce(jnp.add, [x[:, i : i + rows] for i in window])
  return functools.reduce(jnp.add, [x[:, :, i : i + columns] for i in window])
