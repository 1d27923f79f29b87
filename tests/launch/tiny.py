"""Presets that train in seconds: built-in scenes of 16 pixels, 2 steps.

Use as --config=tests/launch/tiny.py:TASK.
"""

import ml_collections

from selfboottok_jax.presets import generator, scaling, tokenizer


def get_config(task: str) -> ml_collections.ConfigDict:
  """The tiny configuration of a task."""
  shrink()
  modules = {'tokenizer': tokenizer, 'scaling': scaling, 'generator': generator}
  return modules[task].get_config('quickstart')


def shrink() -> None:
  """Makes this process's quickstart a tiny one."""
  for module, preset in (
    (tokenizer, tokenizer_preset),
    (scaling, scaling_preset),
    (generator, generator_preset),
  ):
    module.PRESETS['quickstart'] = preset


def tokenizer_preset(config: ml_collections.ConfigDict) -> None:
  """Every module and every loss, at width 16."""
  _common(config)
  config.model.patch_size = 8
  config.model.num_tokens = 4
  config.model.num_codebooks = 2
  config.model.token_dim = 8
  config.model.encoder_width = config.model.decoder_width = 16
  config.model.encoder_depth = config.model.decoder_depth = 1
  config.model.head_dim = 8
  config.model.codebook_size = 8
  config.model.local1d_width = config.model.local2d_width = 16
  config.model.local2d_depth = 1
  config.loss.projector_width = 16
  config.loss.adversarial_start = 0.0
  config.loss.ot_iterations = 5
  config.discriminator.kind = 'stylegan'
  config.discriminator.stylegan.width = 8
  config.discriminator.stylegan.max_width = 8
  config.networks.discriminator = 'dino_tiny:random'


def scaling_preset(config: ml_collections.ConfigDict) -> None:
  """Stage 1's aligner, a block deeper."""
  config.model.local2d_width = 16
  config.model.local2d_depth = 2


def generator_preset(config: ml_collections.ConfigDict) -> None:
  """A SiT of width 16."""
  _common(config)
  config.model.width = 16
  config.model.depth = 2
  config.model.heads = 2
  config.model.align_depth = 1
  config.model.projector_width = 16
  config.networks.teacher = 'hog'
  config.loss.statistics_images = 16
  config.sampling.num_steps = 3


def _common(config: ml_collections.ConfigDict) -> None:
  config.data.source = 'procedural'
  config.data.image_size = 16
  config.data.batch_size = 4
  config.train.steps = 2
  config.train.log_every = 1
  config.evaluation.num_images = 8
  config.evaluation.batch_size = 4
