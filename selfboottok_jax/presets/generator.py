"""The generator of global tokens. Use as configs/generator.py:PRESET."""

from typing import Any

import ml_collections

from selfboottok_jax import presets

# Widths of SiT's paper; REPA aligns deeper in the larger two.
SIZES = {
  's': {'width': 384, 'depth': 12, 'heads': 6, 'align_depth': 4},
  'b': {'width': 768, 'depth': 12, 'heads': 12, 'align_depth': 4},
  'l': {'width': 1024, 'depth': 24, 'heads': 16, 'align_depth': 8},
  'xl': {'width': 1152, 'depth': 28, 'heads': 16, 'align_depth': 8},
}
# Fields of SiT that the codes, the data and the teacher decide.
NOT_CHOSEN = ('positions', 'cls_dim', 'align_dim')


def get_config(preset: str = 'quickstart') -> ml_collections.ConfigDict:
  """The configuration of a preset; `config.tokenizer` names a tokenizer run."""
  config = presets.get_base('generator')
  # A folder that launch.encode wrote: codes in place of images.
  config.data.cache = ''
  config.data.random_crop = False
  config.model = presets.fields_of('models/sit.py', 'SiT', without=NOT_CHOSEN)
  config.model.update(SIZES['b'])
  config.loss = presets.fields_of('stages/generator.py', 'Objective')
  config.networks = ml_collections.ConfigDict()
  # Its class vector and patches make SiT a REG; '' is plain SiT.
  config.networks.teacher = 'dinov2_b'
  # Features of the distance of evaluation.num_samples samples.
  config.networks.frechet = 'hog'
  config.optimizer.schedule = 'constant'
  config.optimizer.b2 = 0.999
  config.optimizer.warmup = 0.0
  config.train.steps = 800_000
  config.evaluation.num_samples = 0  # samples at each evaluation; 0 makes none
  # How samples are made where flags say nothing else.
  config.sampling = presets.fields_of('inference/sampling.py', 'Sampling')
  # Whether the codes come from a cache.
  config.assumed.cache = False
  # The tokenizer whose codes it models.
  config.assumed.tokenizer = _tokenizer_of(preset)
  presets.choose(PRESETS, preset, 'configs/generator.py')(config)
  return config


def _tokenizer_of(preset: str) -> str:
  """Names the tokenizer to assume where a generator is given none.

  It is a preset of configs/tokenizer.py, or a released autoencoder.
  """
  family = preset.split('_')[0]
  return {
    'softvq': 'imagenet256_softvq',
    'sit': 'sdvae',
    'reg': 'sdvae',
    'lightningdit': 'vavae',
  }.get(family, family)


def quickstart(config: ml_collections.ConfigDict) -> None:
  """A few minutes on two CPU cores, on the quickstart tokenizer."""
  photos64(config)
  config.data.source = 'procedural'
  config.data.image_size = 32
  config.model.width = 128
  config.model.heads = 4
  config.model.projector_width = 128
  config.train.steps = 750
  config.evaluation.every = 400


def photos64(config: ml_collections.ConfigDict) -> None:
  """A small REG on a photos64 tokenizer."""
  config.data.batch_size = 64
  config.data.image_size = 64
  config.model.width = 192
  config.model.depth = 6
  config.model.heads = 6
  config.model.align_depth = 2
  config.model.projector_width = 256
  config.loss.statistics_images = 2_048
  config.networks.teacher = 'hog'
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


def _imagenet256(
  size: str, changes: dict[str, Any] | None = None
) -> presets.Preset:
  def preset(config: ml_collections.ConfigDict) -> None:
    config.model.update(SIZES[size])
    config.model.dtype = 'bfloat16'
    config.model.remat = 'dots'
    config.update_from_flattened_dict(changes or {})

  return preset


# SiT without a teacher, and the guidance of its authors: on the first 3 of 4
# channels, at all times.
PLAIN = {
  'networks.teacher': '',
  'loss.cls': 0.0,
  'loss.align_mode': 'off',
  'sampling.guidance_scale': 1.5,
  'sampling.guidance_high': 1.0,
  'sampling.guided_channels': 3,
}
LIGHTNING = {
  'networks.teacher': '',
  'loss.cls': 0.0,
  'loss.align_mode': 'off',
  'model.norm': 'rms',
  'model.mlp': 'swiglu',
  'model.rope': True,
  'loss.times': 'logit_normal',
  'loss.velocity_cosine': 1.0,
  'loss.latent_statistics': 'channel',
  'optimizer.learning_rate': 2e-4,
  'optimizer.b2': 0.95,
  'data.batch_size': 1024,
  'sampling.sampler': 'ode',
  'sampling.time_shift': 0.3,
  'sampling.guidance_scale': 6.7,
  'sampling.guidance_high': 0.875,
  'sampling.guided_channels': 3,
}

PRESETS = {
  'quickstart': quickstart,
  'photos64': photos64,
  **{f'imagenet256_{size}': _imagenet256(size) for size in SIZES},
  # The control that the paper lacks: the baseline's tokens, with REG.
  **{f'softvq_{size}': _imagenet256(size) for size in SIZES},
  # 256 patches of a 2D autoencoder: what is released, see
  # launch.import_generator.
  'sit_xl2': _imagenet256('xl', PLAIN),
  'reg_xl2': _imagenet256('xl'),
  'lightningdit_xl1': _imagenet256('xl', LIGHTNING),
}
