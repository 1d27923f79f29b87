"""Checks of a configuration that need neither data nor weights.

A value that belongs to one thing is checked by that thing: a model's field by
the model, a weight by the objective, a rate by the optimizer. Here stand the
keys of the run itself, and what depends on the machine.
"""

import ml_collections

from selfboottok_jax import errors, inference, placement, sizes, trees
from selfboottok_jax.data import sources
from selfboottok_jax.models import layers
from selfboottok_jax.stages import generator, objective
from selfboottok_jax.training import boards, checkpointing

OBJECTIVES = {
  'tokenizer': objective.Objective,
  'scaling': objective.Objective,
  'generator': generator.Objective,
}
LEAST = {
  'assumed.num_classes': 1,
  'checkpoint.every': 0,
  'checkpoint.max_to_keep': 1,
  'data.max_pixels': 1,
  'data.num_threads': -1,
  'data.num_workers': -1,
  'evaluation.every': 0,
  'evaluation.num_images': 0,
  'evaluation.num_samples': 0,
  'log.grids_kept': 0,
  'train.accumulate': 1,
  'train.log_every': 0,
  'train.seed': 0,
  'train.steps': 1,
}
MOST_SEED = 2**31 - 1


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError for the first value that no run can use."""
  errors.require_choice('task', config.task, OBJECTIVES)
  values = trees.flatten(config.to_dict())
  for key, least in LEAST.items():
    if key in values:
      errors.require(values[key] >= least, key, values[key], f'{least} or more')
  sizes.canonical(config.data.image_size)
  errors.require_choice('data.bad', config.data.bad, sources.BAD)
  seed, ema = config.train.seed, config.train.ema
  errors.require(seed <= MOST_SEED, 'train.seed', seed, f'{MOST_SEED} or less')
  errors.require(0 <= ema < 1, 'train.ema', ema, 'a number from 0 to below 1')
  OBJECTIVES[config.task](**config.loss)
  if 'sampling' in config:
    try:
      inference.Sampling(**config.sampling)
    except errors.UserError as error:
      # It names its own field, which flags of launch/sample.py have too.
      raise errors.ConfigError(f'sampling.{error}') from error
  _check_attention(config)
  if config.log.wandb:
    boards.import_wandb(config.log.wandb)
  if config.init_from:
    checkpointing.read_config(config.init_from, 'init_from')


def _check_attention(config: ml_collections.ConfigDict) -> None:
  """Raises ConfigError for an implementation that cannot run here."""
  attention, dtype = config.model.attention, config.model.dtype
  platform, wanted = placement.platform(), layers.PLATFORMS.get(attention)
  if wanted and (platform != wanted or dtype == 'float32'):
    raise errors.ConfigError(
      f'model.attention={attention} on {platform} with model.dtype={dtype}; '
      f'wanted a {wanted.upper()} and bfloat16, or '
      '--config.model.attention=auto'
    )
