import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import aligners, tokenizer
from selfboottok_jax.pretrained import released_softvq
from tests.inference import released

TEACHER = 32


@pytest.fixture(scope='module')
def arrays():
  return released.state_dict(teacher=TEACHER)


@pytest.mark.parametrize('settings', [{}, released.SETTINGS])
def test_arrays_tell_all_sizes(arrays, settings):
  fields = released_softvq.fields(arrays, 'test', settings)
  assert released.SIZES.items() <= fields.items()
  assert fields['mlp_ratio'] == 4.0
  assert fields['tau'] == 0.07
  model = tokenizer.Tokenizer(**fields)
  model.check()
  assert model.groups == ('global',)


def test_temperature_is_that_of_the_settings(arrays):
  settings = released.SETTINGS | {'tau': 0.1}
  assert released_softvq.fields(arrays, 'test', settings)['tau'] == 0.1


def test_settings_of_another_model_are_in_one_error(arrays):
  settings = released.SETTINGS | {
    'image_size': 512, 'use_rope': True, 'enc_type': 'cnn', 'tau': None,
  }  # fmt: skip
  with pytest.raises(errors.WeightsError) as caught:
    released_softvq.fields(arrays, 'some.safetensors', settings)
  for words in (
    'config.json of some.safetensors',
    'image_size=512, wanted 16',
    'use_rope=True, wanted False',
    "enc_type='cnn', wanted 'vit'",
    'tau=None, wanted a number above 0',
  ):
    assert words in str(caught.value)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'encoder.latent_tokens': None}, 'no encoder.latent_tokens'),
    ({'quantize.embedding': 'quantize.codebook_used'}, 'is (3, 65536)'),
  ],
)
def test_arrays_of_another_model(arrays, change, words):
  changed = dict(arrays)
  for name, other in change.items():
    changed[name] = arrays.get(other)
    if other is None:
      del changed[name]
  with pytest.raises(errors.WeightsError) as caught:
    released_softvq.fields(changed, 'some.safetensors', {})
  assert 'some.safetensors is no SoftVQ-VAE' in str(caught.value)
  assert words in str(caught.value)


def test_what_is_released_is_named_by_its_repository():
  for name, public in released_softvq.RELEASED.items():
    if public is not None:
      short = public.hub.removeprefix('SoftVQVAE/').replace('-', '')
      assert name.replace('_', '') == short


@pytest.fixture(scope='module')
def model(arrays):
  return tokenizer.Tokenizer(**released_softvq.fields(arrays, 'test', {}))


@pytest.fixture(scope='module')
def params(arrays, model):
  return released_softvq.read(arrays, model, 'test')


def _shapes(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


def test_parameters_are_those_that_the_model_and_the_head_want(model, params):
  wanted = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
  )['params']
  head = aligners.Projector(TEACHER, 7)
  wanted[released_softvq.HEAD] = jax.eval_shape(
    head.init, jax.random.key(0), jnp.zeros((1, 6, 5))
  )['params']
  assert _shapes(params) == _shapes(wanted)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_what_is_added_to_a_constant_is_added_once(arrays, params):
  encoder, decoder = params['encoder'], params['decoder']
  np.testing.assert_array_equal(
    encoder['latent_queries'],
    arrays['encoder.latent_tokens'] + arrays['encoder.latent_pos_embed'],
  )
  for ours, side in ((encoder, 'encoder'), (decoder, 'decoder')):
    table = arrays[f'{side}.model.pos_embed']
    cls = arrays[f'{side}.model.cls_token'] + table[:, :1]
    np.testing.assert_array_equal(ours['cls'], cls)
    np.testing.assert_array_equal(ours['patch_positions'], table[:, 1:])


def test_patches_are_embedded_as_by_a_convolution(arrays, model, params):
  images = np.random.default_rng(0).normal(size=(1, 16, 16, 3))
  kernel = arrays['encoder.model.patch_embed.proj.weight']
  patch = images[0, 4:8, 8:12].transpose(2, 0, 1)
  bias = arrays['encoder.model.patch_embed.proj.bias']
  expected = np.einsum('dchw,chw->d', kernel, patch) + bias
  embed = params['encoder']['patch_embed']
  flat = images[0, 4:8, 8:12].reshape(-1)
  np.testing.assert_allclose(
    flat @ embed['kernel'] + embed['bias'], expected, atol=1e-5
  )


def test_blocks_are_in_their_order(arrays, params):
  stacked = params['encoder']['blocks']['block']['mlp']['up']['kernel']
  for index in range(2):
    name = f'encoder.model.blocks.{index}.mlp.fc1.weight'
    np.testing.assert_array_equal(stacked[index], arrays[name].T)


def test_what_served_training_alone_may_be_missing(arrays, model, params):
  bare = {
    name: array
    for name, array in arrays.items()
    if not name.startswith(('repa_model.', 'projection.', 'decoder.model.pa'))
    and name != 'quantize.codebook_used'
  }
  assert len(bare) < len(arrays) - 20
  again = released_softvq.read(bare, model, 'test')
  assert params.keys() - again.keys() == {released_softvq.HEAD}
  jax.tree.map(
    np.testing.assert_array_equal,
    again,
    {name: params[name] for name in again},
  )


def test_all_that_does_not_fit_is_in_one_error(arrays, model):
  changed = dict(arrays) | {
    'decoder.ffn.weight': np.zeros(3, np.float32),
    'encoder.model.norm.weight': np.zeros(63, np.float32),
    'decoder.mask_token': np.full((1, 1, 128), np.nan, np.float32),
  }
  for name in ('encoder.model.blocks.1.ls2.gamma', 'projection.4.bias'):
    del changed[name]
  with pytest.raises(errors.WeightsError) as caught:
    released_softvq.read(changed, model, 'some.safetensors')
  for words in (
    'some.safetensors',
    'missing: encoder.model.blocks.1.ls2.gamma; projection.4.bias',
    'unexpected: decoder.ffn.weight',
    'encoder.model.norm.weight is (63,), wanted (64,)',
    'not finite numbers: decoder.mask_token',
  ):
    assert words in str(caught.value)


def test_another_image_size_is_refused(arrays, model):
  with pytest.raises(errors.WeightsError) as caught:
    released_softvq.read(arrays, model.clone(image_size=32), 'test')
  for words in (
    'does not fit SoftVQ-VAE at 32 pixels',
    'encoder.model.pos_embed is (1, 17, 64), wanted (1, 65, 64)',
    'decoder.model.pos_embed is (1, 17, 128), wanted (1, 65, 128)',
  ):
    assert words in str(caught.value)
