"""Flags of launch.ablate that make every training tiny."""

from selfboottok_jax import presets, trees
from tests.launch import tiny

_STAGES = {
  'tokenizer': tiny.tokenizer_preset,
  'generator': tiny.generator_preset,
}
_SHARED = ('--config.tokenizer.loss.', '--config.tokenizer.discriminator.')


def flags(*more: str) -> list[str]:
  """Built-in scenes, networks of width 16, two steps."""
  changed = []
  for stage, shrink in _STAGES.items():
    config = presets.get_config(f'{stage}:photos64').unlock()
    plain = trees.flatten(config.to_dict())
    # A default that follows others would not be set by a flag.
    shrink(config)
    values = trees.flatten(config.to_dict())
    changed += [
      f'--config.{stage}.{key}={value}'
      for key, value in values.items()
      if value != plain[key]
    ]
  common = {
    'data.source': 'procedural',
    'data.image_size': 16,
    'data.batch_size': 4,
    'train.steps': 2,
    'evaluation.num_images': 8,
    'evaluation.batch_size': 4,
  }
  return [
    '--base=photos64',
    *changed,
    *(f'--config.scaling.{key}={value}' for key, value in common.items()),
    # Stage 2 goes on with stage 1's critic, and its losses.
    *(
      flag.replace('.tokenizer.', '.scaling.', 1)
      for flag in changed
      if flag.startswith(_SHARED)
    ),
    '--config.scaling.model.local2d_width=16',
    '--config.evaluate.data.num_images=8',
    '--config.evaluate.data.batch_size=8',
    '--config.evaluate.num_samples=8',
    *more,
  ]
