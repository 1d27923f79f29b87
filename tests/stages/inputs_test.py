import pytest

from selfboottok_jax import errors
from selfboottok_jax.stages import inputs
from selfboottok_jax.training import sharding
from tests.launch import tiny


@pytest.fixture
def config():
  return tiny.get_config('generator')


def test_data_is_given_by_a_path_a_cache_or_the_built_in_scenes(config):
  assert inputs.has_data(config)
  config.data.source = 'auto'
  assert not inputs.has_data(config)
  for key in ('path', 'cache'):
    config.data[key] = 'somewhere'
    assert inputs.has_data(config)
    config.data[key] = ''


def test_held_out_images_are_as_many_as_asked_for(config):
  source, mesh = inputs.open_data(config, 'val'), sharding.make_mesh()
  config.evaluation.batch_size = mesh.size
  batches = inputs.eval_batches(config, source, mesh)
  assert batches.count == config.evaluation.num_images
  every = inputs.eval_batches(config, source, mesh, num_images=0)
  assert every.count == len(source)
  config.evaluation.batch_size = mesh.size + 1
  with pytest.raises(errors.ConfigError, match='evaluation.batch_size=9'):
    inputs.eval_batches(config, source, mesh)


def test_images_have_the_size_of_the_tokenizers(config):
  stage1 = tiny.get_config('tokenizer').to_dict()
  inputs.check_image_size(config, stage1)
  config.data.image_size, config.tokenizer = 32, 'runs/tok'
  with pytest.raises(
    errors.ConfigError, match='tokenizer=runs/tok is of 16; set --config.data'
  ):
    inputs.check_image_size(config, stage1)
  # A run's config.json has lists.
  config.data.image_size = (32, 16)
  stage1['data']['image_size'] = [32, 16]
  inputs.check_image_size(config, stage1)
  config.data.image_size = (16, 32)
  with pytest.raises(
    errors.ConfigError, match=r'=\(16, 32\).*config.data.image_size=32,16'
  ):
    inputs.check_image_size(config, stage1)
