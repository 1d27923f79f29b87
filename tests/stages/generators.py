"""Tiny generator tasks: plain SiT, REG and its modes."""

import jax

from selfboottok_jax import pretrained
from selfboottok_jax.inference import tokenizer
from selfboottok_jax.models import sit
from selfboottok_jax.stages import frozen_encoders, generator
from tests import tiny

K, E = tiny.TOKENIZER['num_tokens'], tiny.TOKENIZER['token_dim']
CLASSES = 3


def make_encoding(tokenizer_params, *, has_cls=True, align_mode='repeat'):
  """A tiny tokenizer, and a teacher without weights on its patches."""
  codec = tokenizer.image_encoder_of(tiny.make_tokenizer(), tokenizer_params)
  teacher = None
  if has_cls or align_mode != 'off':
    teacher = pretrained.load_network(
      'hog', patch_size=tiny.TOKENIZER['patch_size']
    )
  return frozen_encoders.FrozenEncoders(codec, teacher, has_cls, align_mode)


def make_task(
  tokenizer_params,
  *,
  has_cls=True,
  align_mode='repeat',
  cached=False,
  model=None,
  **objective,
):
  """A task whose model fits its encoding."""
  encoder = make_encoding(
    tokenizer_params, has_cls=has_cls, align_mode=align_mode
  )
  shapes = encoder.shapes
  cls_dim = shapes['cls'].shape[0] if has_cls else 0
  align_dim = shapes['targets'].shape[1] if 'targets' in shapes else 0
  if align_mode == 'cls_only':
    align_dim = cls_dim
  fields = {'width': 16, 'depth': 2, 'heads': 2, 'align_depth': 1}
  network = sit.SiT(
    num_tokens=K,
    token_dim=E,
    num_classes=CLASSES,
    cls_dim=cls_dim,
    align_dim=align_dim,
    projector_width=16,
    **fields | (model or {}),
  )
  goal = generator.Objective(align_mode=align_mode, **objective)
  return generator.GeneratorTask(network, goal, encoder, cached=cached)


def plain_task(tokenizer_params, **options):
  """SiT without a teacher."""
  return make_task(tokenizer_params, has_cls=False, align_mode='off', **options)


def tokenizer_params():
  """Of tiny.make_tokenizer()."""
  init = tiny.make_tokenizer().init
  return tiny.noise_for(init, jax.random.key(0), tiny.images(1))['params']
