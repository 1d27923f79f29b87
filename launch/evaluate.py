"""Scores a tokenizer's reconstructions, or a generator's samples.

  python -m launch.evaluate --workdir=runs/tok --config.data.path=PHOTOS
  python -m launch.evaluate --workdir=runs/gen --tokenizer=runs/tok_big \
    --config.data.path=PHOTOS

Prints a table and one JSON line, and writes scores.json into the workdir.
"""

import dataclasses
import json
import math
import pathlib

import ml_collections
from absl import flags

from launch import cli
from selfboottok_jax import data, errors, files, inference, pretrained
from selfboottok_jax.evaluation import content, evaluate, tables
from selfboottok_jax.stages import generator_stage as builder
from selfboottok_jax.training import sharding, workdirs

_CONFIG = cli.define_config('configs/evaluate.py')
_WORKDIR = flags.DEFINE_string('workdir', None, 'The run to score.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'Workdir of the tokenizer that decodes for a generator.'
)


def main(argv) -> None:
  """Scores what the flags say."""
  del argv
  cli.require(workdir=_WORKDIR.value)
  files.check_folder('workdir', _WORKDIR.value)
  cli.start_jax()
  run_config = workdirs.read_config(_WORKDIR.value, '--workdir')
  if run_config['task'] == 'generator':
    scores = score_generator(_CONFIG.value, _WORKDIR.value, _TOKENIZER.value)
  else:
    scores = score_tokenizer(_CONFIG.value, _WORKDIR.value)
  records = [dataclasses.asdict(score) for score in scores]
  text = json.dumps(records, indent=2) + '\n'
  files.write_atomically(
    pathlib.Path(_WORKDIR.value) / evaluate.SCORES, text.encode()
  )
  cli.say(tables.table(records, ['metric', 'value', 'protocol']))
  cli.say(json.dumps({score.metric: score.value for score in scores}))


def score_tokenizer(
  config: ml_collections.ConfigDict, workdir: str
) -> list[content.Score]:
  """Reconstruction scores of a run."""
  tokenizer = inference.load_tokenizer(workdir)
  source, batches = _open(config, tokenizer.config)
  perceptual = None
  if config.networks.perceptual:
    perceptual = pretrained.load_perceptual(config.networks.perceptual)
  return evaluate.evaluate_tokenizer(
    workdir,
    tokenizer,
    batches,
    sharding.make_mesh(),
    reference=_reference(source, batches),
    perceptual=perceptual,
  )


def score_generator(
  config: ml_collections.ConfigDict, workdir: str, tokenizer: str | None
) -> list[content.Score]:
  """Frechet distance of a run's samples."""
  cli.require(tokenizer=tokenizer)
  if config.num_samples < 2:
    raise errors.ConfigError(
      f'num_samples={config.num_samples}; wanted 2 or more, for a covariance'
    )
  _check_scales(config.guidance_scales)
  generator = inference.load_generator(
    workdir, tokenizer=inference.load_tokenizer(tokenizer)
  )
  source, batches = _open(config, generator.config)
  return evaluate.evaluate_generator(
    workdir,
    generator,
    batches,
    builder.load_frechet(
      config.networks.frechet, generator.tokenizer.patch_size
    ),
    num_samples=config.num_samples,
    batch_size=config.data.batch_size,
    reference=_reference(source, batches),
    seed=config.seed,
    scales=tuple(config.guidance_scales),
  )


def _check_scales(scales) -> None:
  for scale in scales:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
      raise errors.ConfigError(
        f'guidance_scales={tuple(scales)}; wanted numbers, as '
        '--config.guidance_scales="(1.0, 1.5)"'
      )


def _open(config, run_config):
  trained = run_config['data']
  # A path of one's own is recognised by its kind, unless a source is named.
  own = 'auto' if config.data.path else trained['source']
  source = data.open_source(
    config.data.source or own,
    config.data.path or trained['path'],
    config.data.split,
    trained['image_size'],
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
    image_size=trained['image_size'],
    num_images=config.data.num_images or None,
    num_threads=config.data.num_threads,
  )
  return source, batches


def _reference(source, batches) -> str:
  return (
    f'{batches.count} images of {source!r}, fingerprint '
    f'{source.fingerprint[:12]}'
  )


if __name__ == '__main__':
  cli.run(main)
