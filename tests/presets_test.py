import dataclasses
import inspect

import pytest

import selfboottok_jax as sbt
from configs import evaluate
from selfboottok_jax import errors, presets
from selfboottok_jax.models import sit, tokenizer
from selfboottok_jax.training import optim


def test_presets_are_found_by_name_and_locked():
  config = sbt.get_config('tokenizer:photos64')
  assert config.task == 'tokenizer'
  config.model.tau = 0.1
  with pytest.raises(AttributeError, match='nobody'):
    config.model.nobody = 1


def test_a_scoring_is_configured_by_the_package_alone():
  config = sbt.get_config('evaluate')
  assert config.data.split == 'val'
  assert config.to_dict() == evaluate.get_config().to_dict()
  assert callable(sbt.score_run)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('tokeniser:photos64', "no stage 'tokeniser'.*tokenizer, scaling, gen"),
    ('photos64', 'wanted STAGE:PRESET'),
    ('generator:photos65', "no preset 'photos65'; choose one of quickstart"),
    ('generator:', "no preset ''"),
  ],
)
def test_a_name_that_is_none_lists_the_others(name, message):
  with pytest.raises(errors.ConfigError, match=message):
    sbt.get_config(name)


def test_defaults_are_those_of_the_class():
  model = presets.fields_of('models/tokenizer.py', 'Tokenizer')
  made = tokenizer.Tokenizer(image_size=256)
  names = {field.name for field in dataclasses.fields(made)}
  assert set(model) == names - {'image_size', 'parent', 'name'}
  assert all(getattr(made, name) == value for name, value in model.items())
  chosen = presets.fields_of('models/sit.py', 'SiT', without=('positions',))
  assert 'positions' not in chosen
  assert 'num_tokens' not in chosen  # it has no default
  assert chosen.mlp == sit.SiT.mlp


def test_defaults_are_those_of_the_function():
  found = presets.fields_of('training/optim.py', 'build_optimizer')
  parameters = inspect.signature(optim.build_optimizer).parameters.values()
  assert found.to_dict() == {
    p.name: p.default for p in parameters if p.default is not p.empty
  }
  mesh = presets.fields_of(
    'training/sharding.py', 'make_mesh', without=('devices',)
  )
  assert mesh.to_dict() == {'data': -1, 'fsdp': -1}
