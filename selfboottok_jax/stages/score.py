"""Scores of a run, as presets/evaluate.py describes them."""

import math
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from selfboottok_jax import data, errors, inference, pretrained, sizes
from selfboottok_jax.evaluation import evaluate, scores
from selfboottok_jax.stages import generator_stage
from selfboottok_jax.training import checkpointing, sharding


def score_run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  tokenizer: str | os.PathLike[str] = '',
) -> list[scores.Score]:
  """Scores a tokenizer's reconstructions or a generator's samples.

  Args:
    config: that of `selfboottok_jax.get_config('evaluate')`.
    workdir: the run.
    tokenizer: workdir of the tokenizer that decodes for a generator.

  Returns:
    A score per metric; they are written into the workdir too.

  Raises:
    UserError: the folder is no run, or the configuration does not fit it.
  """
  workdir, tokenizer = os.fspath(workdir), os.fspath(tokenizer)
  task = checkpointing.read_config(workdir, '--workdir')['task']
  if task == 'generator':
    found = _score_generator(config, workdir, tokenizer)
  else:
    found = _score_tokenizer(config, workdir)
  evaluate.write_scores(workdir, found)
  return found


def _score_tokenizer(
  config: ml_collections.ConfigDict, workdir: str
) -> list[scores.Score]:
  """Scores of reconstructions."""
  tokenizer = inference.load_tokenizer(workdir)
  batches, reference = _open_images(config, tokenizer.config['data'])
  perceptual = None
  if config.networks.perceptual:
    perceptual = pretrained.load_perceptual(config.networks.perceptual)
  return evaluate.evaluate_tokenizer(
    workdir,
    tokenizer,
    batches,
    sharding.make_mesh(),
    reference=reference,
    perceptual=perceptual,
  )


def _score_generator(
  config: ml_collections.ConfigDict, workdir: str, tokenizer: str
) -> list[scores.Score]:
  """Frechet distances of samples."""
  if not tokenizer:
    raise errors.ConfigError(
      f'--tokenizer not given; {workdir} is a generator, wanted the workdir of '
      'the tokenizer that decodes for it'
    )
  if config.num_samples < 2:
    raise errors.ConfigError(
      f'num_samples={config.num_samples}; wanted 2 or more, for a covariance'
    )
  scales = tuple(config.guidance_scales)
  for scale in scales:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
      raise errors.ConfigError(
        f'guidance_scales={scales}; wanted numbers, as '
        '--config.guidance_scales="(1.0, 1.5)"'
      )
  generator = inference.load_generator(workdir, tokenizer=tokenizer)
  batches, reference = _open_images(config, generator.config['data'])
  return evaluate.evaluate_generator(
    workdir,
    generator,
    batches,
    generator_stage.load_frechet(
      config.networks.frechet, generator.tokenizer.patch_size
    ),
    num_samples=config.num_samples,
    batch_size=config.data.batch_size,
    reference=reference,
    seed=config.seed,
    scales=scales,
  )


def _open_images(
  config: ml_collections.ConfigDict, trained: Mapping[str, Any]
) -> tuple[data.EvalBatches, str]:
  """Opens the images of the configuration, else those of the training.

  Args:
    config: empty values in it are those of the training.
    trained: the section `data` of the run's configuration.

  Returns:
    The batches, and a description of the images.
  """
  # The kind of a path of one's own is detected, unless a source is named.
  own = 'auto' if config.data.path else trained['source']
  image_size = sizes.canonical(trained['image_size'])
  source = data.open_source(
    config.data.source or own,
    config.data.path or trained['path'],
    config.data.split,
    image_size,
    # As the training read them: earlier versions ignored the orientation.
    options=data.Options(
      trained.get('exif', False),
      trained.get('max_pixels', data.Options().max_pixels),
    ),
    bad=trained.get('bad', 'stop'),
  )
  if config.data.num_images < 0:
    raise errors.ConfigError(
      f'data.num_images={config.data.num_images}; wanted 0 (all) or more'
    )
  sharding.check_batch_size(
    config.data.batch_size, sharding.make_mesh(), 'data.batch_size'
  )
  batches = data.make_eval_dataset(
    source,
    batch_size=config.data.batch_size,
    image_size=image_size,
    num_images=config.data.num_images or None,
    num_threads=config.data.num_threads,
  )
  return batches, (
    f'{batches.count} images of {source!r}, fingerprint '
    f'{source.fingerprint[:12]}'
  )
