"""Scores of finished runs, each with its protocol."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, PyTree, UInt8

from selfboottok_jax import errors, files, inference, pixels, trees
from selfboottok_jax.evaluation import frechet, reconstruction, scores
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.pretrained import contract

Images = UInt8[Array, 'b h w 3'] | UInt8[np.ndarray, 'b h w 3']
Batches = Iterable[dict[str, np.ndarray]]
# The file of a workdir that holds the scores of its run.
SCORES = 'scores.json'
# True where more is better; of the other metrics neither direction is.
DIRECTIONS = {'psnr': True, 'ssim': True, 'ssim_range2': True}
PROTOCOLS = {
  'psnr': 'data range 1 on [0, 1], uint8, per image then mean',
  'psnr_mean_image': 'baseline: the mean image of the set in every place',
  'psnr_mean_colour': "baseline: each image's own mean colour",
  'ssim': '7x7 uniform window, data range 1, per channel then mean',
  'ssim_range2': 'as ssim with data range 2 on [0, 1]: inflated, for '
  'comparison with published tables',
  'codes_used': 'share of codes that are some token’s nearest',
  'perplexity': 'exp of the entropy of nearest codes, mean over codebooks',
}


def evaluate_tokenizer(
  name: str,
  tokenizer: inference.Tokenizer,
  batches: Batches,
  mesh: Mesh,
  *,
  reference: str,
  perceptual: contract.PerceptualDistance | None = None,
) -> list[scores.Score]:
  """Measures how well a tokenizer reconstructs images.

  Args:
    name: name of the run.
    tokenizer: the trained tokenizer to measure.
    batches: uint8 centre crops with masks; iterated over several times.
    mesh: devices to compute on.
    reference: description of the images, for the protocol.
    perceptual: a distance to measure as well, or None.

  Returns:
    One score per metric.

  Raises:
    UserError: the tokenizer is a released autoencoder. It has no codebooks,
      which part of the scores are about.
  """
  # `load_tokenizer` may return either kind.
  if not isinstance(tokenizer, inference.ImageTokenizer):
    raise errors.UserError(
      f'{name} is a released autoencoder, without codebooks to measure; wanted '
      'the workdir of a trained tokenizer'
    )
  measured = dict(
    reconstruction.Reconstruction(tokenizer.model, batches, mesh).run_params(
      tokenizer.params
    )
  )
  where = (
    f'{reference}; centre crops; step {tokenizer.step}, EMA weights '
    f'{trees.weights_hash(tokenizer.params)}; {jax.default_backend()}'
  )
  result = []
  for metric, value in measured.items():
    # 'codes_used' also describes 'codes_used_global' and the like.
    exact = [metric] if metric in PROTOCOLS else []
    family = (exact or [k for k in PROTOCOLS if metric.startswith(k)])[0]
    result.append(
      scores.Score(
        name,
        metric,
        value,
        DIRECTIONS.get(metric),
        f'{PROTOCOLS[family]}; {where}',
      )
    )
  if perceptual is not None:
    result.append(
      scores.Score(
        name,
        f'distance ({perceptual.name})',
        _perceptual(tokenizer, batches, perceptual),
        False,
        f'{perceptual.name} (weights {trees.weights_hash(perceptual.params)}) '
        f'on [-1, 1], uint8 rounded; {where}',
      )
    )
  return result


def _perceptual(
  tokenizer: inference.ImageTokenizer,
  batches: Batches,
  perceptual: contract.PerceptualDistance,
) -> float:
  """Averages the distance between images and their reconstructions."""
  distance = jax.jit(perceptual.__call__)

  def measure(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    made = tokenizer.decode(tokenizer.encode(batch['image']))
    # Through uint8 and back, so that all scores are of the same images.
    values = distance(
      perceptual.params,
      pixels.to_float(jnp.asarray(batch['image'])),
      pixels.to_float(pixels.to_uint8(made, 'round')),
    )
    # Padding rows do not count. In float64: see `scores.add_up`.
    values = np.asarray(values, np.float64)[batch['mask']]
    return {'distance': values.sum(), 'count': len(values)}

  totals = scores.add_up(map(measure, batches))
  return float(totals['distance'] / totals['count'])


def image_features(
  network: contract.FeatureNetwork,
) -> Callable[[Images], Float[Array, 'b d']]:
  """Makes a function that turns uint8 images into one vector per image.

  The vector is the network's class token or, if it has none, the mean of its
  patches; `network` is a FeatureNetwork with its parameters.
  """

  @jax.jit
  def features(
    params: PyTree, images: Num[Array, 'b h w 3']
  ) -> Float[Array, 'b d']:
    seen = network(params, pixels.to_float(images))
    return jnp.mean(seen.patches, axis=1) if seen.cls is None else seen.cls

  return functools.partial(features, network.params)


def evaluate_generator(
  name: str,
  generator: inference.ImageGenerator,
  batches: Batches,
  network: contract.FeatureNetwork,
  *,
  num_samples: int,
  batch_size: int,
  reference: str,
  seed: int = 0,
  scales: Sequence[float] = (),
) -> list[scores.Score]:
  """Measures the Frechet distance of samples to real images.

  A baseline is measured too: decoded Gaussian codes of the right mean and
  deviation, as a generator would make that has learnt nothing else. Samples
  have balanced labels.

  Args:
    name: name of the run.
    generator: the generator to measure.
    batches: real images as uint8 centre crops with masks.
    network: a feature network, see `image_features`.
    num_samples: number of samples, and of decoded Gaussian codes.
    batch_size: samples at a time.
    reference: description of the real images, for the protocol.
    seed: seed of all noise.
    scales: guidance scales to measure, each with a score; () measures the
      configured one.

  Returns:
    A score for each scale, and the baseline's.
  """
  features = image_features(network)

  def fit(images: Iterable[np.ndarray]) -> frechet.Gaussian:
    return frechet.fit(np.asarray(features(batch)) for batch in images)

  # Padding rows of the last batch would bias the fit.
  real = frechet.fit(
    np.asarray(features(batch['image']))[batch['mask']] for batch in batches
  )
  metric = f'FD ({network.name})'
  where = _where(generator, network, num_samples, reference)
  labels = balanced_labels(num_samples, generator.num_classes)
  found = []
  for scale in scales or (generator.sampling.guidance_scale,):
    sampling = dataclasses.replace(generator.sampling, guidance_scale=scale)
    sampled = fit(
      sample_batches(
        generator, labels, batch_size, seed=seed, guidance_scale=scale
      )
    )
    label = f'{metric}, guidance {scale:g}' if scales else metric
    distance = frechet.frechet_distance(sampled, real)
    protocol = f'{sampling.describe()}; {where}'
    found.append(scores.Score(name, label, distance, False, protocol))
  noise = fit(_gaussian_batches(generator, num_samples, batch_size, seed))
  baseline = frechet.frechet_distance(noise, real)
  protocol = (
    'baseline: decoded Gaussian codes of the right mean and deviation; ' + where
  )
  return [
    *found,
    scores.Score(name, f'{metric}, Gaussian codes', baseline, False, protocol),
  ]


def _where(
  generator: inference.ImageGenerator,
  network: contract.FeatureNetwork,
  num_samples: int,
  reference: str,
) -> str:
  """Describes the part of the protocol that all distances share."""
  decoder = generator.tokenizer
  patch = getattr(network, 'patch_size', None)
  return (
    f'{network.name} features{f", patch {patch}" if patch else ""}, weights '
    f'{trees.weights_hash(network.params)}; {num_samples} samples, rounded '
    f'down to uint8, balanced labels, against centre crops of {reference}; '
    f'step {generator.step}, EMA weights '
    f'{trees.weights_hash(generator.params)}, decoded by a tokenizer of step '
    f'{decoder.step}, EMA weights {trees.weights_hash(decoder.params)}; '
    f'{jax.default_backend()}'
  )


def balanced_labels(count: int, num_classes: int) -> Int[np.ndarray, ' n']:
  """Returns int32 labels [count] that repeat 0, 1, ..., num_classes - 1."""
  return np.arange(count, dtype=np.int32) % num_classes


def sample_batches(
  generator: inference.ImageGenerator,
  labels: Int[np.ndarray, ' n'],
  batch_size: int,
  *,
  indices: Int[np.ndarray, ' m'] | None = None,
  seed: int = 0,
  guidance_scale: float | None = None,
) -> Iterator[UInt8[np.ndarray, 'b h w 3']]:
  """Yields uint8 samples in batches.

  Args:
    generator: makes the samples.
    labels: classes of all samples, by index.
    batch_size: samples at a time, rounded up to fill all devices.
    indices: the samples wanted; all of `labels` by default.
    seed: seed of the noise.
    guidance_scale: used in place of that of `generator.sampling`.
  """
  if indices is None:
    indices = np.arange(len(labels))
  if guidance_scale is None:
    guidance_scale = generator.sampling.guidance_scale
  # Rounded up: a round that is not full costs as much as a full one.
  at_a_time = -(-batch_size // generator.round_size) * generator.round_size
  for first in range(0, len(indices), at_a_time):
    chosen = indices[first : first + at_a_time]
    images = generator.sample_uint8(
      labels[chosen],
      indices=chosen,
      seed=seed,
      guidance_scale=guidance_scale,
    )
    yield np.asarray(images)


def _gaussian_batches(
  generator: inference.ImageGenerator,
  num_samples: int,
  batch_size: int,
  seed: int,
) -> Iterator[UInt8[np.ndarray, 'b h w 3']]:
  """Yields decoded Gaussian codes of the right mean and deviation, as uint8."""
  tokenizer, statistics = generator.tokenizer, generator.statistics
  shape = (batch_size, tokenizer.num_tokens, tokenizer.token_dim)
  for first in range(0, num_samples, batch_size):
    key = jax.random.fold_in(jax.random.key(seed), first)
    # The last batch is drawn in full too, so that decoding compiles once.
    noise = jax.random.normal(key, shape)
    codes = path_lib.denormalise_codes(noise, statistics)
    count = min(batch_size, num_samples - first)
    yield np.asarray(pixels.to_uint8(tokenizer.decode(codes)))[:count]


def write_scores(
  workdir: str | os.PathLike[str], found: Sequence[scores.Score]
) -> None:
  """Writes the scores of a run into its workdir, as scores.json."""
  records = [dataclasses.asdict(score) for score in found]
  files.write_json(files.as_path(workdir) / SCORES, records)


def read_scores(workdir: str | os.PathLike[str]) -> list[scores.Score]:
  """Reads the scores that `write_scores` wrote; [] if there is no file.

  Raises:
    UserError: the file is damaged.
  """
  path = files.as_path(workdir) / SCORES
  with files.reaching(path):
    if not path.exists():
      return []
    text = path.read_bytes()
  with contextlib.suppress(ValueError, TypeError, KeyError):
    # Only known fields, so that files of other versions stay readable.
    known = [field.name for field in dataclasses.fields(scores.Score)]
    return [
      scores.Score(**{name: record[name] for name in known})
      for record in json.loads(text)
    ]
  raise errors.UserError(
    f'{path} is damaged; measure again with launch.evaluate --workdir={workdir}'
  )
