import copy
import json
import pickle

import pytest

from selfboottok_jax import presets
from selfboottok_jax.presets import following, tokenizer


@pytest.fixture(autouse=True)
def quickstart(monkeypatch):
  """The true one, whatever tests before have shrunk."""
  monkeypatch.setitem(tokenizer.PRESETS, 'quickstart', tokenizer.quickstart)


@pytest.mark.parametrize('preset', tokenizer.PRESETS)
def test_at_its_own_size_a_preset_is_what_it_says(preset):
  config = tokenizer.get_config(preset)
  wanted = {'quickstart': 16, 'rehearsal': 16}.get(
    preset, 32 if 'photos64' in preset else 64
  )
  assert config.model.num_tokens == wanted
  assert type(config.model.num_tokens) is int
  assert config.model.quantizer_chunk == 2 * ('photos' not in preset) * (
    preset != 'quickstart'
  )
  assert config.discriminator.stylegan.min_resolution == 4


@pytest.mark.parametrize(
  ('preset', 'size', 'tokens', 'chunk', 'resolution'),
  [
    # 6 x 4 patches: 12 tokens are nearer to 16 than 24 are.
    ('quickstart', (48, 32), 12, 0, 4),
    # 8 x 5 patches: 20 is nearer than 8 or 40.
    ('quickstart', (64, 40), 20, 0, 4),
    # 12 x 8 patches: three to each of the 32 tokens.
    ('photos64', (96, 64), 32, 0, 4),
    # 9 x 9 patches, and 72 is halved three times only.
    ('photos64', 72, 32, 0, 9),
    # 15 x 20 patches: 60 tokens, 15 to a codebook, one at a time.
    ('imagenet256', (240, 320), 60, 1, 4),
    # 225 patches, of which no multiple of 4 near 64 is a divisor.
    ('imagenet256', 240, 64, 2, 4),
    ('imagenet256', (256, 384), 64, 2, 4),
  ],
)
def test_numbers_follow_the_images(preset, size, tokens, chunk, resolution):
  config = tokenizer.get_config(preset)
  config.data.image_size = size
  assert config.model.num_tokens == tokens
  assert config.model.quantizer_chunk == chunk
  assert config.discriminator.stylegan.min_resolution == resolution
  stored = json.loads(json.dumps(config.to_dict()))
  assert stored['model']['num_tokens'] == tokens


def test_a_number_that_was_set_stays():
  config = presets.get_config('tokenizer:quickstart')
  config.model.num_tokens = 16
  config.discriminator.stylegan.min_resolution = 4
  config.data.image_size = (40, 72)
  assert config.model.num_tokens == 16
  assert config.discriminator.stylegan.min_resolution == 4


@pytest.mark.parametrize(
  'changes',
  [
    {'loss.align': 0.0},
    {'loss.repa_mode': 'global'},
    {'loss.repa_global': 0.0, 'loss.repa_local': 0.0},
    {'loss.repa_global': 0.0, 'model.local1d_width': 0},
    {'networks.repa_global': 'inception', 'loss.repa_local': 0.0},
    # They are refused, under their own names.
    {'data.image_size': (44, 32)},
    {'data.image_size': 0},
    {'model.patch_size': 0},
    {'model.num_codebooks': 0},
  ],
)
def test_without_a_need_the_number_of_tokens_stays(changes):
  config = tokenizer.get_config()
  config.update_from_flattened_dict({'data.image_size': (48, 32)} | changes)
  assert config.model.num_tokens == 16


@pytest.mark.parametrize(
  'how', [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_copy_follows_its_own_size(how):
  config = tokenizer.get_config()
  other = how(config)
  other.data.image_size = (48, 32)
  assert (config.model.num_tokens, other.model.num_tokens) == (16, 12)
  assert config == tokenizer.get_config()
  other.model.num_tokens = 24
  config.data.image_size = (48, 32)
  assert (config.model.num_tokens, other.model.num_tokens) == (12, 24)


@pytest.mark.parametrize(
  ('wanted', 'patches', 'multiple', 'found'),
  [
    (64, 256, 4, 64),
    (64, 300, 4, 60),
    (64, 225, 4, None),
    (64, 225, 1, 75),
    # As near, so the larger; and fewer patches than tokens.
    (10, 24, 4, 12),
    (40, 15, 1, 45),
  ],
)
def test_the_nearest_count(wanted, patches, multiple, found):
  assert following.nearest_count(wanted, patches, multiple) == found
