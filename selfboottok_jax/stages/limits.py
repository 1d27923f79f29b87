"""Which values the keys of a configuration may take, one by one.

What depends on two keys or on the devices is checked where it is used.
"""

from collections.abc import Mapping
from typing import Any

from selfboottok_jax import errors
from selfboottok_jax.flow import samplers
from selfboottok_jax.models import sit

LEAST = {
  'assumed.num_classes': 1,
  'checkpoint.every': 0,
  'checkpoint.max_to_keep': 1,
  'data.image_size': 1,
  'data.num_threads': 0,
  'data.num_workers': 0,
  'discriminator.dino.kernel': 1,
  'discriminator.stylegan.max_width': 1,
  'discriminator.stylegan.min_resolution': 1,
  'discriminator.stylegan.width': 1,
  'evaluation.every': 0,
  'evaluation.num_images': 0,
  'evaluation.num_samples': 0,
  'loss.adversarial': 0,
  'loss.align': 0,
  'loss.cls': 0,
  'loss.consistency': 0,
  'loss.hinge': 0,
  'loss.kl': 0,
  'loss.lecam': 0,
  'loss.ot_iterations': 1,
  'loss.perceptual': 0,
  'loss.pixel': 0,
  'loss.projector_width': 1,
  'loss.repa_global': 0,
  'loss.repa_local': 0,
  'loss.statistics_images': 0,
  'loss.transport': 0,
  'loss.velocity_cosine': 0,
  'model.align_depth': 1,
  'model.codebook_size': 1,
  'model.decoder_depth': 1,
  'model.depth': 1,
  'model.encoder_depth': 1,
  'model.heads': 1,
  'model.local1d_width': 0,
  'model.local2d_depth': 0,
  'model.projector_width': 1,
  'model.unroll': 1,
  'model.width': 1,
  'optimizer.clip_norm': 0,
  'optimizer.weight_decay': 0,
  'sampling.cls_guidance_scale': -1,
  'sampling.guidance_scale': 0,
  'sampling.guided_channels': 0,
  'sampling.num_steps': 1,
  'train.log_every': 0,
  'train.seed': 0,
  'train.steps': 1,
}
MOST = {'train.seed': 2**31 - 1}
POSITIVE = (
  'loss.kl_temperature',
  'loss.ot_epsilon',
  'model.mlp_ratio',
  'model.tau',
  'optimizer.epsilon',
  'optimizer.learning_rate',
  'sampling.time_shift',
)
# From 0 to below 1.
DECAYS = ('optimizer.b1', 'optimizer.b2', 'train.ema')
# From 0 to 1.
SHARES = (
  'loss.adversarial_start',
  'loss.augment',
  'loss.perceptual_warmup',
  'model.group_dropout',
  'model.label_dropout',
  'optimizer.final',
  'optimizer.warmup',
)
CHOICES = {
  'model.attention': ('xla', 'cudnn'),
  'model.dtype': ('float32', 'bfloat16'),
  'model.mlp': tuple(sit.MLPS),
  'model.norm': sit.NORMS,
  'sampling.sampler': tuple(samplers.SAMPLERS),
}


def check(values: Mapping[str, Any]) -> None:
  """Raises ConfigError for the first value that no run can use.

  Args:
    values: a configuration with dotted keys; keys that it lacks are passed
      over.
  """
  for key, value in values.items():
    wanted = None
    if key in CHOICES and value not in CHOICES[key]:
      wanted = f'one of {", ".join(CHOICES[key])}'
    elif key in POSITIVE and not value > 0:
      wanted = 'a number above 0'
    elif key in DECAYS and not 0 <= value < 1:
      wanted = 'a number from 0 to below 1'
    elif key in SHARES and not 0 <= value <= 1:
      wanted = 'a number from 0 to 1'
    elif key in LEAST and value < LEAST[key]:
      wanted = f'{LEAST[key]} or more'
    elif key in MOST and value > MOST[key]:
      wanted = f'{MOST[key]} or less'
    if wanted:
      raise errors.ConfigError(f'{key}={value!r}; wanted {wanted}')
  low, high = (values.get(f'sampling.guidance_{x}', 0) for x in ('low', 'high'))
  if not 0 <= low <= high <= 1:
    raise errors.ConfigError(
      f'sampling.guidance_low={low} and sampling.guidance_high={high}; wanted '
      '0 <= low <= high <= 1'
    )
