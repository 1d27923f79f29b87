"""The networks that a configuration names, all together."""

import pytest

from selfboottok_jax import errors
from selfboottok_jax.presets import scaling, tokenizer
from selfboottok_jax.stages import networks
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


# Others have no local 2D tokens, or stay a rehearsal.
SCALED = [
  preset
  for preset in tokenizer.PRESETS
  if preset not in ('imagenet256_softvq', 'imagenet256_g_l1', 'rehearsal')
]


@pytest.mark.parametrize('preset', SCALED)
def test_a_larger_aligner_follows_every_preset(preset):
  stage1 = tokenizer.get_config(preset)
  follower = preset if preset in scaling.PRESETS else 'imagenet256_10m'
  config = scaling.get_config(follower)
  config.data.image_size = stage1.data.image_size
  if stage1.model.share_codebooks:
    with pytest.raises(errors.ConfigError, match="trainable=.*'local2d'"):
      builder.make_scaling_task(config, stage1.to_dict(), abstract=True)
    config.trainable = ('local2d',)
  task = builder.make_scaling_task(config, stage1.to_dict(), abstract=True)
  assert {'repa_global', 'repa_local'}.isdisjoint(task.networks)
  assert 'transport' in task.networks


def test_an_encoder_that_could_not_start_is_refused_without_its_weights():
  config = tokenizer.get_config('imagenet256')
  networks.check_encoder(config, builder_model(config))
  config.encoder_from = 'dinov2_l'
  with pytest.raises(errors.ConfigError, match='wanted 1024'):
    networks.check_encoder(config, builder_model(config))
  config.encoder_from = 'nope'
  with pytest.raises(errors.UserError, match='dinov2_b'):
    networks.check_encoder(config, builder_model(config))


def builder_model(config):
  return builder.tokenizer_lib.Tokenizer(
    image_size=config.data.image_size, **config.model
  )
