"""Presets by name: plain ml_collections, importable without jax."""

import ml_collections

from selfboottok_jax import errors
from selfboottok_jax.presets import generator, scaling, tokenizer

STAGES = {'tokenizer': tokenizer, 'scaling': scaling, 'generator': generator}


def get_config(name: str) -> ml_collections.ConfigDict:
  """The configuration of a preset, locked: values may change, keys may not.

  Args:
    name: 'STAGE:PRESET', as 'tokenizer:photos64'.

  Raises:
    ConfigError: no such stage or preset; lists those that there are.
  """
  stage, _, preset = name.partition(':')
  if stage not in STAGES:
    raise errors.ConfigError(
      f'no stage {stage!r} in {name!r}; wanted STAGE:PRESET with one of '
      f'{", ".join(STAGES)}, as tokenizer:photos64'
    )
  try:
    config = STAGES[stage].get_config(preset)
  except ValueError as error:
    raise errors.ConfigError(str(error)) from error
  return config.lock()
