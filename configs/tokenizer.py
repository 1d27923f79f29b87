"""Stage 1: the tokenizer. Use as configs/tokenizer.py:PRESET."""

import ml_collections

from configs import base


def get_config(preset: str = 'quickstart') -> ml_collections.ConfigDict:
  """The configuration of a preset."""
  config = base.get_base('tokenizer')
  config.model = _model()
  config.loss = _loss()
  config.networks = ml_collections.ConfigDict()
  # 'name' or 'name:path of its weights'.
  config.networks.perceptual = 'hog'
  config.networks.repa_global = 'hog'
  config.networks.repa_local = 'hog'
  config.networks.transport = 'dct'
  config.discriminator = ml_collections.ConfigDict()
  config.discriminator.width = 64
  config.discriminator.max_width = 512
  config.discriminator.min_resolution = 4
  base.choose(PRESETS, preset, 'configs/tokenizer.py')(config)
  return config


def _model() -> ml_collections.ConfigDict:
  """SelfBootTok-B with 64 tokens; fields of models.tokenizer.Tokenizer."""
  model = ml_collections.ConfigDict()
  model.patch_size = 16
  model.num_tokens = 64
  model.token_dim = 32
  model.encoder_width = 768
  model.encoder_depth = 12
  model.decoder_width = 768
  model.decoder_depth = 12
  model.head_dim = 64
  model.mlp_ratio = 4.0
  model.layer_scale = 0.0
  model.codebook_size = 8192
  model.num_codebooks = 4
  model.assignment = 'cosine'
  model.tau = 0.07
  # Tokens per codebook whose logits are in memory at a time; 0 is all.
  model.quantizer_chunk = 0
  model.unit_rms = True
  model.local1d_width = 1024
  model.local2d_width = 384
  model.local2d_depth = 6
  model.causal = True
  model.share_codebooks = False
  model.fusion = 'residual'
  model.cross_attend = 'locals'
  model.bootstrap_from = 'continuous'
  model.group_dropout = 0.0
  model.attention = 'xla'
  model.remat = False
  model.unroll = 1
  model.dtype = 'float32'
  return model


def _loss() -> ml_collections.ConfigDict:
  """Eq. (4) and (5); fields of tasks.objective.Objective."""
  loss = ml_collections.ConfigDict()
  loss.pixel = 1.0
  loss.pixel_kind = 'mse'
  loss.perceptual = 1.0
  loss.perceptual_warmup = 0.04  # 10k of 250k steps
  loss.adversarial = 0.2
  loss.adversarial_start = 0.08  # 20k of 250k steps
  loss.lecam = 0.001
  loss.align = 0.1
  loss.repa_global = 1.0
  loss.repa_local = 1.0
  loss.transport = 1.0
  loss.repa_mode = 'repeat'
  loss.repa_input = 'continuous'
  loss.repa_local_on = 'local1d'
  loss.projector_width = 1024
  loss.ot_loss = 'transport'
  loss.ot_epsilon = 0.05
  loss.ot_iterations = 50
  loss.kl = 0.01
  loss.kl_temperature = 0.01
  loss.kl_pool = False
  return loss


def quickstart(config: ml_collections.ConfigDict) -> None:
  """What two CPU cores learn in minutes: built-in scenes of 32 pixels."""
  small(config)
  config.data.source = 'procedural'
  config.data.image_size = 32
  config.model.patch_size = 8
  config.model.num_tokens = 16
  config.train.steps = 950


def photos64(config: ml_collections.ConfigDict) -> None:
  """Photographs at 64 pixels, on anything from two CPU cores up."""
  small(config)
  config.data.image_size = 64
  config.data.batch_size = 16
  config.model.patch_size = 8
  config.model.num_tokens = 32
  config.train.steps = 3_000


def small(config: ml_collections.ConfigDict) -> None:
  """Widths, rates and intervals that the small presets share."""
  config.data.batch_size = 32
  config.model.token_dim = 16
  config.model.encoder_width = 128
  config.model.encoder_depth = 4
  config.model.decoder_width = 128
  config.model.decoder_depth = 4
  config.model.head_dim = 32
  config.model.codebook_size = 256
  config.model.local1d_width = 256
  config.model.local2d_width = 64
  config.model.local2d_depth = 2
  config.model.unroll = 16
  config.loss.adversarial_start = 0.5
  config.loss.projector_width = 256
  config.loss.perceptual = 0.05
  config.loss.adversarial = 0.005
  config.discriminator.width = 8
  config.discriminator.max_width = 64
  config.optimizer.learning_rate = 2e-3
  config.evaluation.every = 500
  config.evaluation.num_images = 256
  config.evaluation.batch_size = 32
  config.checkpoint.every = 500
  config.train.log_every = 20


def imagenet256(config: ml_collections.ConfigDict) -> None:
  """The paper's sizes and recipe, on the networks that ship.

  50 epochs of 1.28M images at batch 256. The teachers are hog and dct until
  the paper's are named in `networks`.
  """
  config.model.dtype = 'bfloat16'
  config.model.remat = True
  config.model.quantizer_chunk = 2


PRESETS = {
  'quickstart': quickstart,
  'photos64': photos64,
  'imagenet256': imagenet256,
}
