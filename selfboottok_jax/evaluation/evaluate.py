"""Scores of finished runs, each with its protocol."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from selfboottok_jax import inference, pixels, trees
from selfboottok_jax.evaluation import content, frechet, reconstruction, scores
from selfboottok_jax.flow import code_scale

Batches = Iterable[dict[str, np.ndarray]]
# The file of a workdir that keeps the scores of its run.
SCORES = 'scores.json'
# None: neither direction is better.
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
  tokenizer: inference.ImageTokenizer,
  batches: Batches,
  mesh: Mesh,
  *,
  reference: str,
  perceptual: Any = None,
) -> list[content.Score]:
  """Reconstruction scores of a tokenizer.

  Args:
    name: of the run.
    tokenizer: what is measured.
    batches: uint8 centre crops with masks, readable again and again.
    mesh: where to compute.
    reference: what the images are, for the protocol.
    perceptual: a PerceptualDistance to measure besides, or None.

  Returns:
    A score per metric.
  """
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
    family = next((key for key in PROTOCOLS if metric == key), None)
    family = family or next(k for k in PROTOCOLS if metric.startswith(k))
    result.append(
      content.Score(
        name,
        metric,
        value,
        DIRECTIONS.get(metric),
        f'{PROTOCOLS[family]}; {where}',
      )
    )
  if perceptual is not None:
    result.append(
      content.Score(
        name,
        f'distance ({perceptual.name})',
        _perceptual(tokenizer, batches, perceptual),
        False,
        f'{perceptual.name} (weights {trees.weights_hash(perceptual.params)}) on '
        f'[-1, 1], uint8 rounded; {where}',
      )
    )
  return result


def _perceptual(tokenizer, batches, perceptual) -> float:
  distance = jax.jit(perceptual.__call__)
  means = scores.MeanScores()
  for batch in batches:
    quantised = pixels.to_uint8(
      _reconstruct(tokenizer, batch['image']), 'round'
    )
    values = distance(
      perceptual.params,
      _to_float(batch['image']),
      _to_float(quantised),
    )
    means.add({'distance': values}, batch['mask'])
  return means.means()['distance']


def _reconstruct(tokenizer, images):
  return tokenizer.decode(tokenizer.encode(images))


def _to_float(images) -> Float[Array, 'b h w 3']:
  return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1


def image_features(
  network: Any,
) -> Callable[[Num[Array, 'b h w 3']], Float[Array, 'b d']]:
  """Returns uint8 images -> one vector per image, for Frechet distances.

  The network's class vector, or where it has none the mean of its patches.
  """

  @jax.jit
  def features(params, images):
    seen = network(params, _to_float(images))
    return jnp.mean(seen.patches, axis=1) if seen.cls is None else seen.cls

  return functools.partial(features, network.params)


def evaluate_generator(
  name: str,
  generator: inference.ImageGenerator,
  batches: Batches,
  network: Any,
  *,
  num_samples: int,
  batch_size: int,
  reference: str,
  seed: int = 0,
  scales: Sequence[float] = (),
) -> list[content.Score]:
  """Frechet distance of samples to real images, beside a baseline.

  The baseline decodes Gaussian codes of the right mean and deviation: what
  remains when a generator has learnt nothing else. Labels are balanced.
  `scales` of guidance have a score each; () is the one of `generator.sampling`.
  """
  features = image_features(network)

  def fit(images):
    return frechet.fit(np.asarray(features(batch)) for batch in images)

  real = frechet.fit(
    np.asarray(features(batch['image']))[batch['mask']] for batch in batches
  )
  metric = frechet.name_of(network.name)
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
    told = f'{metric}, guidance {scale:g}' if scales else metric
    distance = frechet.frechet_distance(sampled, real)
    protocol = f'{sampling.describe()}; {where}'
    found.append(content.Score(name, told, distance, False, protocol))
  noise = fit(_gaussian_batches(generator, num_samples, batch_size, seed))
  baseline = frechet.frechet_distance(noise, real)
  protocol = (
    'baseline: decoded Gaussian codes of the right mean and deviation; ' + where
  )
  return [
    *found,
    content.Score(name, f'{metric}, Gaussian codes', baseline, False, protocol),
  ]


def _where(generator, network, num_samples, reference) -> str:
  """The part of the protocol that all distances share."""
  decoder = generator.tokenizer
  patch = getattr(network, 'patch_size', None)
  return (
    f'{network.name} features{f", patch {patch}" if patch else ""}, weights '
    f'{trees.weights_hash(network.params)}; {num_samples} samples, rounded down to '
    f'uint8, balanced labels, against centre crops of {reference}; step '
    f'{generator.step}, EMA weights {trees.weights_hash(generator.params)}, decoded '
    f'by a tokenizer of step {decoder.step}, EMA weights '
    f'{trees.weights_hash(decoder.params)}; {jax.default_backend()}'
  )


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
  """Labels 0, 1, ... over and over, [count]."""
  return np.arange(count, dtype=np.int32) % num_classes


def sample_batches(
  generator: inference.ImageGenerator,
  labels: np.ndarray,
  batch_size: int,
  *,
  indices: np.ndarray | None = None,
  seed: int = 0,
  **settings: Any,
) -> Iterator[np.ndarray]:
  """uint8 samples in batches.

  Args:
    generator: what makes them.
    labels: of all samples, by index.
    batch_size: at least so many at a time; as many more as fill all devices.
    indices: which samples; all of `labels` where they are not given.
    seed: of the noise.
    **settings: changes of `generator.sampling`.
  """
  if indices is None:
    indices = np.arange(len(labels))
  at_a_time = -(-batch_size // generator.round_size) * generator.round_size
  for first in range(0, len(indices), at_a_time):
    chosen = indices[first : first + at_a_time]
    # One shape for all batches: one compilation.
    padded = np.resize(chosen, at_a_time)
    images = generator.sample_uint8(
      labels[padded], indices=padded, seed=seed, **settings
    )
    yield np.asarray(images)[: len(chosen)]


def _gaussian_batches(generator, num_samples, batch_size, seed):
  tokenizer, latents = generator.tokenizer, generator.latents
  shape = (batch_size, tokenizer.num_tokens, tokenizer.token_dim)
  for first in range(0, num_samples, batch_size):
    key = jax.random.fold_in(jax.random.key(seed), first)
    noise = jax.random.normal(key, shape)
    codes = code_scale.denormalise(noise, latents)
    count = min(batch_size, num_samples - first)
    yield np.asarray(pixels.to_uint8(tokenizer.decode(codes)))[:count]
