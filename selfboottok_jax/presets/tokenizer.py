"""Stage 1: the tokenizer. Use as configs/tokenizer.py:PRESET."""

from typing import Any

import ml_collections

from selfboottok_jax import presets
from selfboottok_jax.presets import following


def get_config(preset: str = 'quickstart') -> ml_collections.ConfigDict:
  """The configuration of a preset."""
  config = presets.get_base('tokenizer')
  # SelfBootTok-B with 64 tokens.
  config.model = presets.fields_of('models/tokenizer.py', 'Tokenizer')
  # Eq. (4) and (5).
  config.loss = presets.fields_of('stages/objective.py', 'Objective')
  # The transformer that a fresh encoder starts from, as 'dinov2_b' (with
  # model.layer_scale=1e-5); '' starts it from scratch.
  config.encoder_from = ''
  config.networks = ml_collections.ConfigDict()
  # 'name', 'name:SOURCE' or 'name:random', see selfboottok_jax.pretrained.
  config.networks.perceptual = 'hog'
  config.networks.repa_global = 'hog'
  config.networks.repa_local = 'hog'
  config.networks.transport = 'dct'
  # The trunk of a discriminator of kind 'dino'.
  config.networks.discriminator = 'dino_s16'
  # A perceptual distance and features of a Frechet distance of held-out
  # reconstructions, see selfboottok_jax.stages.watching; '' is none.
  config.evaluation.perceptual = 'auto'
  config.evaluation.frechet = 'auto'
  config.discriminator = ml_collections.ConfigDict()
  config.discriminator.kind = 'dino'
  config.discriminator.dino = presets.fields_of(
    'models/discriminators.py', 'DinoDiscriminator', without=('dtype',)
  )
  config.discriminator.stylegan = presets.fields_of(
    'models/discriminators.py',
    'StyleGanDiscriminator',
    without=('dtype', 'group'),
  )
  presets.choose(PRESETS, preset, 'configs/tokenizer.py')(config)
  following.follow(config)
  return config


def quickstart(config: ml_collections.ConfigDict) -> None:
  """Learns built-in scenes of 32 pixels in minutes on two CPU cores."""
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
  config.loss.adversarial_start = 0.5
  config.loss.projector_width = 256
  config.loss.perceptual = 0.05
  config.loss.adversarial = 0.005
  config.loss.hinge = 1.0
  config.loss.consistency = 0.0
  config.loss.augment = 0.0
  config.discriminator.kind = 'stylegan'
  config.discriminator.stylegan.width = 8
  config.discriminator.stylegan.max_width = 64
  config.optimizer.learning_rate = 2e-3
  config.evaluation.every = 500
  config.evaluation.num_images = 256
  config.evaluation.batch_size = 32
  config.checkpoint.every = 500
  config.train.log_every = 20


def photos64_mobilenet(config: ml_collections.ConfigDict) -> None:
  """photos64 with features of ImageNet: MobileNetV2 and LPIPS (squeeze).

  Their files are to be named, as --config.networks.repa_global=
  mobilenet_v2:FILE, or laid into the cache, see `pretrained.store`.
  """
  photos64(config)
  # 600 steps of imagenette64: 15.70 dB and a distance of 0.340 with 0.1, 14.63
  # dB and 0.316 with 1.
  config.loss.perceptual = 0.1
  config.networks.perceptual = 'lpips_squeeze'
  config.networks.repa_global = 'mobilenet_v2'
  config.networks.repa_local = 'mobilenet_v2'


def imagenet256(config: ml_collections.ConfigDict) -> None:
  """The paper's recipe: the last row of Table 3 before its aligner is scaled.

  50 epochs of 1.28M images at batch 256.
  """
  config.model.dtype = 'bfloat16'
  config.model.remat = 'dots'
  config.model.quantizer_chunk = 2
  config.model.layer_scale = 1e-5
  config.encoder_from = 'dinov2_b'
  config.networks.perceptual = 'lpips_vgg'
  config.networks.repa_global = 'dinov2_l'
  config.networks.repa_local = 'ijepa_h'
  config.networks.transport = 'vavae'
  config.networks.discriminator = 'dino_s16'


def rehearsal(config: ml_collections.ConfigDict) -> None:
  """Every code path of imagenet256 at a size for two CPU cores.

  The networks have random weights: it shows that a recipe runs on the data at
  hand, not what it learns.
  """
  imagenet256(config)
  config.data.image_size = 128
  config.data.batch_size = 8
  config.model.num_tokens = 16
  config.model.token_dim = 16
  config.model.encoder_width = 48
  config.model.encoder_depth = 2
  config.model.decoder_width = 128
  config.model.decoder_depth = 2
  config.model.head_dim = 16
  config.model.codebook_size = 512
  config.model.local1d_width = 128
  config.model.local2d_width = 64
  config.model.local2d_depth = 2
  config.encoder_from = 'dinov2_tiny:random'
  config.networks.perceptual = 'lpips_squeeze:random'
  config.networks.repa_global = 'dinov2_tiny:random'
  config.networks.repa_local = 'ijepa_tiny:random'
  config.networks.transport = 'vavae_tiny:random'
  config.networks.discriminator = 'dino_tiny:random'
  config.loss.projector_width = 128
  # Gains of 1e-5 take longer than this to grow, and a distance of random
  # features would be all that is learnt.
  config.model.layer_scale = 0.1
  config.loss.perceptual = 0.1
  config.loss.adversarial_start = 0.4
  config.loss.perceptual_warmup = 0.2
  config.optimizer.learning_rate = 2e-3
  config.train.steps = 50
  config.train.log_every = 5
  config.evaluation.every = 25
  config.evaluation.num_images = 16
  config.evaluation.batch_size = 8
  config.checkpoint.every = 25


def _imagenet256(changes: dict[str, Any]) -> presets.Preset:
  def preset(config: ml_collections.ConfigDict) -> None:
    imagenet256(config)
    config.update_from_flattened_dict(changes)

  return preset


# What the other rows of Table 3, then those of Table 2, change; imagenet256 has
# I-JEPA.
VARIANTS: dict[str, dict[str, Any]] = {
  'softvq': {
    'model.local1d_width': 0,
    'model.local2d_depth': 0,
    # As its authors do.
    'model.bootstrap_from': 'quantized',
    'loss.repa_input': 'quantized',
  },
  'g_l1': {'model.local2d_depth': 0},
  'c_off': {'model.causal': False},
  'cb_off': {'model.share_codebooks': True},
  'dinov2': {'networks.repa_local': 'dinov2_l'},
  'siglip2': {'networks.repa_local': 'siglip2_b'},
}

PRESETS = {
  'quickstart': quickstart,
  'photos64': photos64,
  'photos64_mobilenet': photos64_mobilenet,
  'rehearsal': rehearsal,
  'imagenet256': imagenet256,
  **{f'imagenet256_{k}': _imagenet256(v) for k, v in VARIANTS.items()},
}
