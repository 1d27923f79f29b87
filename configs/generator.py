"""The generator of global tokens. Use as configs/generator.py:PRESET."""

import ml_collections

from configs import base


def get_config(preset: str = 'quickstart') -> ml_collections.ConfigDict:
  """The configuration of a preset; `config.tokenizer` names a tokenizer run."""
  config = base.get_base('generator')
  # Fields of models.sit.SiT; tokens and classes come from tokenizer and data.
  config.model = ml_collections.ConfigDict()
  config.model.width = 768
  config.model.depth = 12
  config.model.heads = 12
  config.model.mlp_ratio = 4.0
  config.model.qk_norm = False
  config.model.label_dropout = 0.1
  config.model.attention = 'xla'
  config.model.remat = False
  config.model.unroll = 1
  config.model.dtype = 'float32'
  # Fields of tasks.generator.Objective.
  config.loss = ml_collections.ConfigDict()
  config.loss.path = 'linear'
  config.loss.latent_statistics = 'scalar'
  config.loss.statistics_images = 10_000
  config.optimizer.schedule = 'constant'
  config.optimizer.b2 = 0.999
  config.optimizer.warmup = 0.0
  config.train.steps = 800_000
  # How samples are made where flags say nothing else.
  config.sampling = ml_collections.ConfigDict()
  config.sampling.sampler = 'sde'
  config.sampling.num_steps = 250
  config.sampling.guidance_scale = 2.3
  config.sampling.guidance_low = 0.0
  config.sampling.guidance_high = 0.85
  # The preset of tokenizer whose codes it models.
  config.assumed.tokenizer = preset.split('_')[0]
  base.choose(PRESETS, preset, 'configs/generator.py')(config)
  return config


def quickstart(config: ml_collections.ConfigDict) -> None:
  """A few minutes on two CPU cores, on the quickstart tokenizer."""
  photos64(config)
  config.data.source = 'procedural'
  config.data.image_size = 32
  config.model.width = 128
  config.model.heads = 4
  config.train.steps = 750
  config.evaluation.every = 400


def photos64(config: ml_collections.ConfigDict) -> None:
  """A small SiT on a photos64 tokenizer."""
  config.data.batch_size = 64
  config.data.image_size = 64
  config.model.width = 192
  config.model.depth = 6
  config.model.heads = 6
  config.model.unroll = 16
  config.loss.statistics_images = 2_048
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup = 0.02
  config.train.steps = 3_000
  config.train.log_every = 20
  config.evaluation.every = 1_000
  config.evaluation.num_images = 256
  config.evaluation.batch_size = 64
  config.checkpoint.every = 500
  config.sampling.num_steps = 50
  config.sampling.guidance_scale = 1.5


def _imagenet256(width: int, depth: int, heads: int):
  def preset(config: ml_collections.ConfigDict) -> None:
    config.model.width = width
    config.model.depth = depth
    config.model.heads = heads
    config.model.dtype = 'bfloat16'
    config.model.remat = True

  return preset


PRESETS = {
  'quickstart': quickstart,
  'photos64': photos64,
  'imagenet256_s': _imagenet256(384, 12, 6),
  'imagenet256_b': _imagenet256(768, 12, 12),
  'imagenet256_l': _imagenet256(1024, 24, 16),
  'imagenet256_xl': _imagenet256(1152, 28, 16),
}
