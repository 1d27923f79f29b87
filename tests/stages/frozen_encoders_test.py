import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.inference import tokenizer
from selfboottok_jax.objectives import alignment
from selfboottok_jax.stages import frozen_encoders
from tests import tiny
from tests.stages import generators


@pytest.fixture(scope='module')
def params():
  return generators.tokenizer_params()


def test_codes_are_those_of_the_tokenizer(params):
  encoder = generators.make_encoding(params, has_cls=False, align_mode='off')
  images = tiny.images(3)
  made = jax.jit(encoder)(encoder.params, images)
  assert set(made) == {'codes'}
  wanted = tiny.make_tokenizer().apply(
    {'params': params}, images, method='encode'
  )
  np.testing.assert_allclose(made['codes'], wanted, atol=1e-6)
  assert set(encoder.params['tokenizer']) == {'encoder', 'quantizer_global'}


@pytest.mark.parametrize('mode', list(alignment.ALIGNMENTS))
def test_targets_give_the_loss_of_the_patches(params, mode):
  encoder = generators.make_encoding(params, align_mode=mode)
  images = tiny.images(2)
  made = encoder(encoder.params, images)
  patches = encoder.teacher({}, images).patches
  tokens = jax.random.normal(
    jax.random.key(0), (2, generators.K, patches.shape[-1])
  )
  np.testing.assert_allclose(
    alignment.target_loss(made['targets'], tokens),
    alignment.alignment_loss(patches, tokens, mode=mode),
    rtol=1e-6,
  )
  np.testing.assert_array_equal(
    made['cls'], encoder.teacher({}, images).cls.astype(jnp.float32)
  )


@pytest.mark.parametrize('mode', ['repeat', 'pool'])
def test_tokens_that_pair_with_no_patches_name_the_key(params, mode):
  encoder = generators.make_encoding(params, align_mode=mode)
  # 3 x 4 patches beside 8 tokens.
  frozen_encoders.check_pairing(encoder)
  tokenizer = dataclasses.replace(encoder.tokenizer, image_size=(12, 16))
  other = dataclasses.replace(encoder, tokenizer=tokenizer)
  with pytest.raises(
    errors.ConfigError,
    match=f'loss.align_mode={mode} .*8 tokens .*12 patches of networks.teacher'
    '=hog in images of 12x16.*--config.loss.align_mode=global',
  ):
    frozen_encoders.check_pairing(other)
  for fitting in ('global', 'cls_only', 'off'):
    frozen_encoders.check_pairing(
      dataclasses.replace(other, align_mode=fitting)
    )


@pytest.mark.parametrize('mode', frozen_encoders.ALIGN_MODES)
def test_shapes_are_those_of_one_image(params, mode):
  encoder = generators.make_encoding(params, align_mode=mode)
  made = encoder(encoder.params, tiny.images(2))
  assert {k: v.shape[1:] for k, v in made.items()} == {
    k: v.shape for k, v in encoder.shapes.items()
  }
  assert ('targets' in made) == encoder.has_targets
  assert encoder.has_targets == (mode in alignment.ALIGNMENTS)


def test_nothing_is_learnt_through_it(params):
  encoder = generators.make_encoding(params)
  gradient = jax.grad(
    lambda p: sum(jnp.sum(v) for v in encoder(p, tiny.images(1)).values())
  )(encoder.params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_what_the_teacher_has_not_is_refused(params):
  codec = tokenizer.image_encoder_of(tiny.make_tokenizer(), params)
  with pytest.raises(errors.ConfigError, match='need a teacher'):
    frozen_encoders.FrozenEncoders(codec, None, has_cls=True)
  with pytest.raises(errors.ConfigError, match='wanted one of repeat'):
    frozen_encoders.FrozenEncoders(codec, None, align_mode='each')
  teacher = pretrained.load_network('dct', patch_size=4, dim=8)
  headless = frozen_encoders.FrozenEncoders(codec, teacher, has_cls=True)
  with pytest.raises(errors.ConfigError, match='dct has no class vector'):
    _ = headless.shapes
