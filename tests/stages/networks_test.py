"""The networks that a configuration names, all together."""

import pytest

from selfboottok_jax import errors
from selfboottok_jax.presets import tokenizer
from selfboottok_jax.stages import tokenizer_stage as builder
from tests.launch import tiny


def test_all_that_lack_weights_are_in_one_error(monkeypatch, tmp_path):
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path))
  config = tiny.get_config('tokenizer')
  config.networks.perceptual = 'lpips_vgg'
  config.networks.repa_global = 'dinov2_b:/no/such.pth'
  config.networks.repa_local = 'ijepa_h:/not/there.pth'
  with pytest.raises(errors.WeightsError) as caught:
    builder.make_tokenizer_task(config)
  message = str(caught.value)
  assert message.startswith('3 networks lack weights: ')
  for part in ('vgg16-397923af.pth', '/no/such.pth', '/not/there.pth'):
    assert part in message
  assert '\n' not in message


def test_terms_that_name_the_same_network_share_it():
  config = tokenizer.get_config('imagenet256_dinov2')
  task = builder.make_tokenizer_task(config, abstract=True)
  assert task.networks['repa_global'] is task.networks['repa_local']
  assert set(task.frozen) == {
    'perceptual', 'repa_global', 'transport', 'discriminator_trunk',
  }  # fmt: skip
