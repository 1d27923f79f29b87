import pytest

from selfboottok_jax import errors
from selfboottok_jax.presets import scaling, tokenizer
from selfboottok_jax.stages import tokenizer_stage

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
      tokenizer_stage.make_scaling_task(config, stage1.to_dict(), abstract=True)
    config.trainable = ('local2d',)
  task = tokenizer_stage.make_scaling_task(
    config, stage1.to_dict(), abstract=True
  )
  assert {'repa_global', 'repa_local'}.isdisjoint(task.networks)
  assert 'transport' in task.networks


def test_an_encoder_that_could_not_start_is_refused_without_its_weights():
  config = tokenizer.get_config('imagenet256')
  tokenizer_stage.make_tokenizer_task(config, abstract=True)
  config.encoder_from = 'dinov2_l'
  with pytest.raises(errors.ConfigError, match='wanted 1024'):
    tokenizer_stage.make_tokenizer_task(config, abstract=True)
  config.encoder_from = 'nope'
  with pytest.raises(errors.UserError, match='dinov2_b'):
    tokenizer_stage.make_tokenizer_task(config, abstract=True)
