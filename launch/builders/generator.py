"""The task that trains a generator."""

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from launch.builders import common
from selfboottok_jax import data, errors, inference
from selfboottok_jax.evaluation import evaluators
from selfboottok_jax.models import sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.tasks import generator
from selfboottok_jax.training import checkpointing


def build_generator(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> common.Built:
  """A generator of the codes of `config.tokenizer`."""
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a tokenizer run, as in '
      '--config.tokenizer=runs/tok'
    )
  check_classes(train, config)
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  common.check_image_size(config, run.config)
  tokenizer = inference.tokenizer_of(run)
  task = make_generator_task(
    config, tokenizer.model, tokenizer.params, len(train.class_names)
  )
  goal = task.objective

  def start(state):
    latents = None
    if config.init_from:
      source = checkpointing.read_run(
        config.init_from, what='init_from', task='generator'
      )
      state = common.fine_tune(
        state,
        'generator',
        source.ema['generator'],
        config.init_from,
        # Other classes: their embeddings start fresh.
        may_differ=('label_table',),
      )
      # Of the same codes, the same normalisation.
      same_kind = (
        source.config['loss']['latent_statistics'] == goal.latent_statistics
      )
      if (
        same_kind
        and source.meta['tokenizer_fingerprint'] == tokenizer.fingerprint
      ):
        latents = source.stats['latents']
    if latents is None:
      latents = _latents(config, goal, tokenizer, train)
    placed = jax.tree.map(
      lambda new, old: jax.device_put(np.asarray(new), old.sharding),
      dict(latents),
      state.stats['latents'],
    )
    return state.replace(stats={**state.stats, 'latents': placed})

  batches = common.eval_batches(config, common.open_data(config, 'val'), mesh)
  return common.assemble(
    config,
    task,
    train,
    start=start,
    evaluators=lambda frozen: [
      evaluators.Velocity(task, batches, mesh, frozen)
    ],
    model_fields=config.model.to_dict(),
    tokenizer_fingerprint=tokenizer.fingerprint,
  )


def check_classes(
  source: data.Source, config: ml_collections.ConfigDict
) -> None:
  """DataError for images without classes."""
  if not source.class_names:
    raise errors.DataError(
      f'data.path={config.data.path} has no class folders; a generator wanted '
      'PHOTOS/CLASS/*.jpg, or PHOTOS/train/CLASS/*.jpg'
    )


def make_generator_task(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  tokenizer_params: PyTree,
  num_classes: int,
) -> generator.GeneratorTask:
  """A generator without data; the parameters may be shapes."""
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=num_classes,
    **config.model,
  )
  if model.width % model.heads:
    raise errors.ConfigError(
      f'model.width={model.width} does not divide by model.heads='
      f'{model.heads}; change one of the two'
    )
  goal = generator.Objective(**config.loss)
  return generator.GeneratorTask(model, goal, tokenizer, tokenizer_params)


def _latents(config, goal, tokenizer, train):
  """Statistics of the codes of centre crops of the training images."""
  batches = data.make_eval_dataset(
    train,
    batch_size=config.data.batch_size,
    image_size=config.data.image_size,
    num_images=min(goal.statistics_images, len(train)),
    num_threads=config.data.num_threads,
  )
  encoded = (
    np.asarray(tokenizer.encode(batch['image']))[batch['mask']]
    for batch in batches
  )
  return generator.measure_latents(encoded, goal.latent_statistics)
