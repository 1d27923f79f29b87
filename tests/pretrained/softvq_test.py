import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import tokenizer
from selfboottok_jax.pretrained import softvq
from tests.inference import released


@pytest.fixture(scope='module')
def arrays():
  return released.state_dict(teacher=32)


@pytest.mark.parametrize('settings', [{}, released.SETTINGS])
def test_arrays_tell_all_sizes(arrays, settings):
  fields = softvq.fields(arrays, 'test', settings)
  assert released.SIZES.items() <= fields.items()
  assert fields['mlp_ratio'] == 4.0
  assert fields['tau'] == 0.07
  model = tokenizer.Tokenizer(**fields)
  model.check()
  assert model.groups == ('global',)


def test_temperature_is_that_of_the_settings(arrays):
  settings = released.SETTINGS | {'tau': 0.1}
  assert softvq.fields(arrays, 'test', settings)['tau'] == 0.1


def test_settings_of_another_model_are_in_one_error(arrays):
  settings = released.SETTINGS | {
    'image_size': 512, 'use_rope': True, 'enc_type': 'cnn', 'tau': None,
  }  # fmt: skip
  with pytest.raises(errors.WeightsError) as caught:
    softvq.fields(arrays, 'some.safetensors', settings)
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
    softvq.fields(changed, 'some.safetensors', {})
  assert 'some.safetensors is no SoftVQ-VAE' in str(caught.value)
  assert words in str(caught.value)


def test_what_is_released_is_named_by_its_repository():
  for name, public in softvq.RELEASED.items():
    if public is not None:
      short = public.hub.removeprefix('SoftVQVAE/').replace('-', '')
      assert name.replace('_', '') == short
