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

from selfboottok_jax import (
  __version__,
  errors,
  files,
  inference,
  pixels,
  trees,
)
from selfboottok_jax.evaluation import frechet, reconstruction, scores
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.pretrained import contract

Images = UInt8[Array, 'b h w 3'] | UInt8[np.ndarray, 'b h w 3']
Batches = Iterable[dict[str, np.ndarray]]
# The file of a workdir that holds the scores of its run.
SCORES = 'scores.json'
# The file of a workdir that lists files of scores elsewhere, as `--out` wrote.
SCORE_FILES = 'score_files.json'
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
  where = {
    'reference': reference,
    'crop': 'centre',
    **parameters(tokenizer),
    **here(),
  }
  result = []
  for metric, value in measured.items():
    # 'codes_used' also describes 'codes_used_global' and the like.
    exact = [metric] if metric in PROTOCOLS else []
    family = (exact or [k for k in PROTOCOLS if metric.startswith(k)])[0]
    described = {'description': PROTOCOLS[family]}
    result.append(scores.Score(name, metric, value, described | where))
  if perceptual is not None:
    distance = perceptual.name
    if not distance.startswith('lpips_'):
      distance = f'distance_{distance}'
    result.append(
      scores.Score(
        name,
        distance,
        _perceptual(tokenizer, batches, perceptual),
        {
          'description': 'on [-1, 1], rounded to uint8 before',
          'network': perceptual.name,
          'weights': trees.weights_hash(perceptual.params),
        }
        | where,
      )
    )
  return result


def parameters(run: inference.ImageTokenizer) -> dict[str, Any]:
  """Describes the parameters that were measured, for a protocol."""
  return {
    'step': run.step,
    'parameters': 'EMA',
    'run_weights': trees.weights_hash(run.params),
  }


def here() -> dict[str, Any]:
  """Describes what computed a score, for a protocol."""
  return {
    'backend': jax.default_backend(),
    'device': jax.devices()[0].device_kind,
    'version': __version__,
  }


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
  metric = f'fd_{network.name}'
  where = _where(generator, network, num_samples, reference) | {'seed': seed}
  labels = balanced_labels(num_samples, generator.num_classes)
  found = []
  for scale in scales or (generator.sampling.guidance_scale,):
    sampling = dataclasses.replace(generator.sampling, guidance_scale=scale)
    sampled = fit(
      sample_batches(
        generator, labels, batch_size, seed=seed, guidance_scale=scale
      )
    )
    distance = frechet.frechet_distance(sampled, real)
    how = {'sampler': sampling.describe(), 'guidance': scale}
    found.append(scores.Score(name, metric, distance, how | where))
  noise = fit(_gaussian_batches(generator, num_samples, batch_size, seed))
  baseline = frechet.frechet_distance(noise, real)
  how = {
    'description': 'baseline: decoded Gaussian codes of the right mean and '
    'deviation'
  }
  return [
    *found,
    scores.Score(name, f'{metric}_gaussian_codes', baseline, how | where),
  ]


def _where(
  generator: inference.ImageGenerator,
  network: contract.FeatureNetwork,
  num_samples: int,
  reference: str,
) -> dict[str, Any]:
  """Describes the part of the protocol that all distances share."""
  decoder = generator.tokenizer
  patch = getattr(network, 'patch_size', None)
  return {
    'network': network.name,
    **({'patch_size': patch} if patch else {}),
    'weights': trees.weights_hash(network.params),
    'count': num_samples,
    'labels': 'balanced',
    'rounding': 'truncate',
    'reference': reference,
    'crop': 'centre',
    'step': generator.step,
    'parameters': 'EMA',
    'run_weights': trees.weights_hash(generator.params),
    'tokenizer_step': decoder.step,
    'tokenizer_weights': trees.weights_hash(decoder.params),
    **here(),
  }


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
  write_file(files.as_path(workdir) / SCORES, found)


def write_file(path: files.Path, found: Sequence[scores.Score]) -> None:
  """Writes scores as a list of JSON objects: run, metric, value, protocol."""
  files.write_json(path, [dataclasses.asdict(score) for score in found])


def read_scores(workdir: str | os.PathLike[str]) -> list[scores.Score]:
  """Reads the scores of a run; [] if it was never measured.

  They are those of scores.json and of the files that score_files.json lists,
  as far as these are still there. Of several values of the same metric and
  protocol the last one counts.

  Raises:
    UserError: a file is damaged.
  """
  workdir = files.as_path(workdir)
  listed = _read_json(workdir / SCORE_FILES) or []
  paths = [workdir / SCORES, *(files.as_path(path) for path in listed)]
  found = [score for path in paths for score in read_file(path)]
  latest = {
    json.dumps([s.metric, s.protocol], sort_keys=True): s for s in found
  }
  return list(latest.values())


def read_file(path: files.Path) -> list[scores.Score]:
  """Reads a file of scores; [] if there is none.

  Earlier versions wrote the protocol in words; it becomes a description.

  Raises:
    UserError: the file is damaged.
  """
  records = _read_json(path)
  with contextlib.suppress(ValueError, TypeError, KeyError):
    return [
      scores.Score(
        record['run'],
        record['metric'],
        record['value'],
        {'description': how}
        if isinstance(how := record['protocol'], str)
        else dict(how),
      )
      for record in records or ()
    ]
  raise _damaged(path)


def _read_json(path: files.Path) -> Any:
  """Reads a JSON file; None if there is none, UserError if it is damaged."""
  with files.reaching(path):
    if not path.exists():
      return None
    text = path.read_bytes()
  try:
    return json.loads(text)
  except ValueError as error:
    raise _damaged(path) from error


def _damaged(path: files.Path) -> errors.UserError:
  return errors.UserError(
    f'{path} is damaged; remove it and measure again with launch.evaluate'
  )
