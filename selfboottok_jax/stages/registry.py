"""Turns a configuration into the objects of its task."""

import jax
import ml_collections
from jax.sharding import Mesh

from selfboottok_jax import data, errors, inference, trees
from selfboottok_jax.stages import (
  generator_stage,
  inputs,
  limits,
  tokenizer_stage,
)
from selfboottok_jax.training import workdirs

TASKS = {
  'tokenizer': tokenizer_stage.build_tokenizer,
  'scaling': tokenizer_stage.build_scaling,
  'generator': generator_stage.build_generator,
}


def build(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> inputs.Built:
  """Builds the task that `config.task` names."""
  check(config)
  return TASKS[config.task](config, train, mesh)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError for what needs no data to be seen to be wrong."""
  limits.check(trees.flatten(config.to_dict()))
  if 'sampling' in config:
    inference.Sampling(**config.sampling)
  _check_attention(config)
  if config.init_from:
    workdirs.read_config(config.init_from, 'init_from')
  if config.task not in TASKS:
    raise errors.ConfigError(
      f'task={config.task!r}; wanted one of {", ".join(TASKS)}'
    )


def _check_attention(config) -> None:
  """Raises ConfigError for an implementation that cannot run here."""
  if config.model.get('attention', 'xla') != 'cudnn':
    return
  if jax.default_backend() != 'gpu' or config.model.dtype == 'float32':
    raise errors.ConfigError(
      f'model.attention=cudnn on {jax.default_backend()} with model.dtype='
      f'{config.model.dtype}; wanted a GPU and bfloat16, or '
      '--config.model.attention=xla'
    )
