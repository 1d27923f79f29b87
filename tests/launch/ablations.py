"""Flags of launch.ablate that make every training tiny."""

from selfboottok_jax import presets, trees
from tests.launch import tiny

_PRESETS = {
  'tokenizer': tiny.tokenizer_preset,
  # Stage 2 goes on with stage 1's critic and losses.
  'scaling': tiny.tokenizer_preset,
  'generator': tiny.generator_preset,
}


def flags(*stages: str) -> list[str]:
  """Built-in scenes of 16 pixels, networks of width 16, two steps.

  Of the stages that are named; a flag that no row takes would be refused.
  """
  found = ['--base=photos64']
  for stage in stages:
    config = presets.get_config(f'{stage}:photos64').unlock()
    plain = trees.flatten(config.to_dict())
    _PRESETS[stage](config)
    found += [
      f'--config.{stage}.{key}={value}'
      for key, value in trees.flatten(config.to_dict()).items()
      # What stage 1 has decided is no key of stage 2, and its depth is what
      # rows are about.
      if value != plain.get(key, value)
      and (stage, key) != ('scaling', 'model.local2d_depth')
    ]
  return [
    *found,
    '--config.evaluate.data.num_images=8',
    '--config.evaluate.data.batch_size=8',
    '--config.evaluate.num_samples=8',
  ]
