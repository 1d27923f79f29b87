import pytest

from selfboottok_jax import data, errors, pretrained
from selfboottok_jax.presets import tokenizer as presets
from selfboottok_jax.stages import watching
from selfboottok_jax.training import sharding
from tests import tiny
from tests.launch import tiny as launch_tiny


def _config(**networks):
  config = presets.get_config('photos64')
  config.networks.update(networks)
  return config


def _chosen(config):
  return (
    watching.choose(config.evaluation.perceptual, watching.PERCEPTUALS, config),
    watching.choose(config.evaluation.frechet, watching.FEATURES, config),
  )


@pytest.fixture
def files(tmp_path):
  """Weight files that are there; what they hold is never read."""
  for name in ('vgg', 'mobile'):
    (tmp_path / f'{name}.npz').write_bytes(b'x')
  return tmp_path


def test_without_weights_at_hand_nothing_is_chosen():
  assert _chosen(_config()) == ('', '')
  # Random ones, and those that would have to be fetched, are not chosen.
  config = _config(perceptual='lpips_squeeze:random', repa_local='inception')
  assert _chosen(config) == ('', '')


def test_networks_of_the_training_are_chosen_with_their_sources(files):
  vgg, mobile = (
    f'lpips_vgg:{files / "vgg.npz"}', f'mobilenet_v2:{files / "mobile.npz"}'
  )  # fmt: skip
  config = _config(perceptual=vgg, repa_global=mobile)
  assert _chosen(config) == (vgg, mobile)
  config.evaluation.perceptual, config.evaluation.frechet = 'hog', ''
  assert _chosen(config) == ('hog', '')


def test_the_cheapest_network_of_the_cache_is_chosen(weights_cache):
  assert not pretrained.is_at_hand('lpips_alex')
  inbox = weights_cache / 'files' / 'mobilenet_v2'
  inbox.mkdir(parents=True)
  file = inbox / 'weights.npz'
  file.write_bytes(b'x')
  try:
    assert pretrained.is_at_hand('mobilenet_v2')
    assert _chosen(_config()) == ('', 'mobilenet_v2')
  finally:
    file.unlink()
    inbox.rmdir()


@pytest.mark.parametrize(
  ('key', 'value', 'error'),
  [
    ('perceptual', 'nope', "unknown perceptual distance 'nope'"),
    ('perceptual', 'lpips_vgg:nope.pth', 'no weight file'),
    ('frechet', 'nope', "unknown feature network 'nope'"),
    ('frechet', 'hog', 'with 1 held-out images'),
  ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(key, value, error):
  config = launch_tiny.get_config('tokenizer')
  config.evaluation.batch_size, config.evaluation.num_images = 8, 1
  config.evaluation[key] = value
  train = data.open_source('procedural', '', 'train', 16)
  with pytest.raises(errors.UserError, match=error):
    watching.held_out(
      config, tiny.make_tokenizer(), train, sharding.make_mesh()
    )
