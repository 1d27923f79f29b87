"""Turns a configuration into the objects of its task."""

import ml_collections
from jax.sharding import Mesh

from launch import limits
from launch.builders import common, generator, tokenizer
from selfboottok_jax import data, errors
from selfboottok_jax.training import checkpointing

TASKS = {
  'tokenizer': tokenizer.build_tokenizer,
  'scaling': tokenizer.build_scaling,
  'generator': generator.build_generator,
}


def build(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> common.Built:
  """Builds the task that `config.task` names."""
  limits.check(checkpointing.flatten(config.to_dict()))
  if config.task not in TASKS:
    raise errors.ConfigError(
      f'task={config.task!r}; wanted one of {", ".join(TASKS)}'
    )
  return TASKS[config.task](config, train, mesh)
