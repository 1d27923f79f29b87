"""Stage 2: a larger local 2D aligner. Use as configs/scaling.py:PRESET."""

import ml_collections

from selfboottok_jax import presets
from selfboottok_jax.presets import tokenizer

# How a model is computed, which is no part of what stage 1 has fixed.
HOW = ('attention', 'remat', 'unroll', 'dtype', 'residual_dtype')
# Width and depth of the aligners of Fig. 6, by the paper's labels.
SIZES = {
  '10m': (384, 6),
  '100m': (768, 14),
  '200m': (1024, 16),
  '400m': (1024, 32),
  '600m': (1280, 30),
}


def get_config(preset: str = 'quickstart') -> ml_collections.ConfigDict:
  """The configuration of a preset; `config.tokenizer` names stage 1's run.

  The model is stage 1's but for the local 2D aligner: `model` here holds only
  what changes.
  """
  presets.choose(PRESETS, preset, 'configs/scaling.py')
  stage1 = preset if preset in tokenizer.PRESETS else preset.split('_')[0]
  config = tokenizer.get_config(stage1)
  config.task = 'scaling'
  # The encoder stays as stage 1 left it.
  del config.encoder_from
  config.assumed.tokenizer = stage1
  chosen = ('local2d_width', 'local2d_depth', *HOW)
  model = presets.fields_of('models/tokenizer.py', 'Tokenizer')
  config.model = ml_collections.ConfigDict({k: model[k] for k in chosen})
  # Modules that are trained; fusion, decoder and local1d may be added.
  config.trainable = ('local2d', 'quantizer_local2d')
  # The discriminator goes on where stage 1 left it.
  config.loss.adversarial_start = 0.0
  config.loss.perceptual_warmup = 0.0
  PRESETS[preset](config)
  return config


def quickstart(config: ml_collections.ConfigDict) -> None:
  """Four times the depth of stage 1's aligner, which it starts from."""
  config.model.local2d_width = 64
  config.model.local2d_depth = 8
  config.train.steps = 450
  config.optimizer.learning_rate = 5e-4
  # In so short a training the aligner alone would trade pixels for the critic:
  # 0.04 dB below stage 1, where it ends 0.05 dB above without.
  config.loss.adversarial = 0.0


def photos64(config: ml_collections.ConfigDict) -> None:
  """The quickstart with more steps, for photographs of 64 pixels."""
  quickstart(config)
  config.train.steps = 3_000
  config.loss.adversarial = 0.005


def _imagenet256(width: int, depth: int) -> presets.Preset:
  def preset(config: ml_collections.ConfigDict) -> None:
    config.model.local2d_width = width
    config.model.local2d_depth = depth
    config.model.dtype = 'bfloat16'
    config.model.remat = 'dots'
    config.train.steps = 375_000  # 75 epochs at batch 256

  return preset


PRESETS = {
  'quickstart': quickstart,
  'photos64': photos64,
  'photos64_mobilenet': photos64,
  **{
    f'imagenet256_{name}': _imagenet256(*size) for name, size in SIZES.items()
  },
}
