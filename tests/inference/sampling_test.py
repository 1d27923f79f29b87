import dataclasses

import pytest

from selfboottok_jax import errors, inference
from selfboottok_jax.flow import samplers
from selfboottok_jax.inference import sampling as sampling_lib
from selfboottok_jax.presets import generator


def test_the_defaults_are_those_of_the_presets():
  config = generator.get_config('imagenet256_xl')
  assert inference.Sampling(**config.sampling) == inference.Sampling()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'sampler': 'rk4'}, 'choose one of sde, ode, heun'),
    ({'num_steps': 0}, 'at least 1 step'),
    ({'last_step': 1.0}, 'between t = 0 and 1'),
    ({'guidance_scale': float('inf')}, 'guidance_scale=inf; wanted a finite'),
    ({'cls_guidance_scale': float('nan')}, 'cls_guidance_scale=nan'),
    ({'guidance_low': 0.9}, 'guidance_low=0.9 and guidance_high=0.85'),
    ({'guidance_low': -0.1}, 'wanted 0 <= low <= high <= 1'),
    ({'guidance_high': 1.1}, 'guidance_high=1.1'),
    ({'guided_channels': -1}, r'guided_channels=-1; wanted 0 \(all\)'),
  ],
)
def test_settings_that_no_sampler_takes(change, message):
  with pytest.raises(errors.UserError, match=message):
    inference.Sampling(**change)


@pytest.mark.parametrize('sampler', list(samplers.SAMPLERS))
def test_every_sampler_can_be_named(sampler):
  text = inference.Sampling(sampler=sampler, num_steps=7).describe()
  assert text.startswith(f'{sampler}, 7 steps')
  # Only the SDE has a last step of its own.
  assert ('last from 0.04' in text) == (sampler == 'sde')


def test_the_class_token_has_the_scale_of_the_tokens_or_its_own():
  plain = inference.Sampling(guidance_scale=2)
  assert plain.scales == (2.0, 2.0)
  assert 'class token' not in plain.describe()
  own = dataclasses.replace(plain, cls_guidance_scale=1)
  assert own.scales == (2.0, 1.0)
  assert '1 on the class token' in own.describe()


def test_a_scale_of_one_alone_is_unguided():
  assert inference.Sampling(guidance_scale=1).is_unguided
  assert 'without guidance' in inference.Sampling(guidance_scale=1).describe()
  half = inference.Sampling(guidance_scale=1, cls_guidance_scale=2)
  assert not half.is_unguided
  assert not inference.Sampling(guidance_scale=1.5).is_unguided


def test_intervals_and_channels_are_told():
  sampling = inference.Sampling(
    guidance_scale=1.5, guidance_low=0, guidance_high=1, guided_channels=3
  )
  assert sampling.interval == (0.0, 1.0)
  text = sampling.describe()
  assert 'guidance 1.5 for t in [0, 1]' in text
  assert 'on the first 3 channels' in text


def test_a_sweep_has_every_setting_once():
  swept = sampling_lib.sweep(
    inference.Sampling(), scales=(1.0, 2.0), lows=(0.0,), highs=(0.5, 1.0)
  )
  assert [one.name for one in swept] == [
    'unguided',
    'scale2_t0-0.5',
    'scale2_t0-1',
  ]


def test_changes_are_the_fields_of_the_settings():
  fields = {f.name: f.type for f in dataclasses.fields(inference.Sampling)}
  assert set(sampling_lib.Changes.__annotations__) == set(fields)
