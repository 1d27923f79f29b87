"""Stage 1 whose encoder starts from a vision transformer."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import vit
from selfboottok_jax.stages import initialization, inputs, tokenizer_stage
from selfboottok_jax.training import checkpointing, sharding
from selfboottok_jax.training import state as state_lib
from tests import tiny as models
from tests.launch import tiny


@pytest.fixture
def config():
  config = tiny.get_config('tokenizer')
  config.model.layer_scale = 1e-5
  config.model.local1d_width = config.model.local2d_depth = 0
  config.encoder_from = 'dinov2_b'
  config.loss.adversarial = config.loss.align = 0.0
  # Two for each of the eight devices.
  config.evaluation.batch_size = 16
  return config


@pytest.fixture
def loads(monkeypatch):
  """Stands for the loader of vision transformers; tells what was loaded."""
  given = []

  def load_vit(spec, *, grid, patch_size, abstract=False):
    network = vit.Vit(grid, patch_size, 16, 1, 2, 64, layer_scale=True)
    if abstract:
      return network, None
    image = jnp.zeros((1, *(side * patch_size for side in grid), 3))
    params = models.noise_for(network.init, jax.random.key(7), image)['params']
    given.append((spec, network, models.awake(params)))
    return network, given[-1][-1]

  monkeypatch.setattr(pretrained, 'load_vit', load_vit, raising=False)
  return given


def _build(config) -> tokenizer_stage.TokenizerStage:
  source = inputs.open_data(config, 'train')
  return tokenizer_stage.TokenizerStage(config, source, sharding.make_mesh())


def _fresh(built, seed=0):
  params, stats = models.noise_for(built.task.init, jax.random.key(seed))
  return state_lib.init_state(params, stats, {}, built.task.ema_groups)


def test_a_fresh_training_starts_from_it(config, loads):
  built = _build(config)
  # Not before there is something to start.
  assert not loads
  state = built.start(_fresh(built))
  ((spec, network, params),) = loads
  assert spec == 'dinov2_b'
  # As trained; the model's are 2 x 2 patches of 8 pixels.
  assert (network.grid, network.patch_size) == ((37, 37), 14)
  mapped = initialization.encoder_params(network, params, 2, 8)
  for group in (state.params, state.ema):
    encoder = group['tokenizer']['encoder']
    assert encoder.keys() - mapped.keys() == set(initialization.FRESH)
    for name, module in mapped.items():
      models.assert_same(encoder[name], module)


def test_a_run_to_fine_tune_counts_more(config, loads, tmp_path):
  built = _build(config)
  other = _fresh(built, seed=1)
  checkpointing.write_config(str(tmp_path), config.to_dict())
  checkpointer = checkpointing.Checkpointer(str(tmp_path), max_to_keep=1)
  with contextlib.closing(checkpointer):
    checkpointer.save(other, {})
  config.init_from = str(tmp_path)
  tuned = _build(config)
  state = tuned.start(_fresh(tuned))
  models.assert_same(state.params['tokenizer'], other.params['tokenizer'])
  assert not loads


def test_a_model_that_does_not_fit_is_refused(config, loads):
  config.model.layer_scale = 0.0
  with pytest.raises(errors.ConfigError, match=r'model\.layer_scale=0'):
    _build(config)
  assert not loads
  config.model.layer_scale = 1e-5
  config.model.encoder_depth = 2
  with pytest.raises(errors.ConfigError, match=r'depth=2, wanted 1'):
    _build(config)
  assert not loads


def test_what_cannot_be_found_is_told_before_anything_is_made(config):
  config.encoder_from = 'dinov2_b:/no/such/file.pth'
  with pytest.raises(errors.WeightsError, match=r'/no/such/file\.pth'):
    _build(config)
