import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfboottok_jax import errors
from selfboottok_jax.stages import dry_run
from selfboottok_jax.training import sharding
from tests.launch import tiny


def test_what_is_not_given_is_assumed_and_listed():
  config = tiny.get_config('generator')
  config.data.source = 'auto'
  config.data.image_size = 32
  config.assumed.tokenizer = 'quickstart'
  config.assumed.num_classes = 7
  tiny.shrink()
  config.data.image_size = 16
  abstract = dry_run.abstract_task(config)
  assert abstract.assumed == [
    'images of 7 classes (data.path is empty)',
    'the tokenizer of configs/tokenizer.py:quickstart (tokenizer is empty)',
  ]
  assert abstract.task.model.num_classes == 7
  leaves = jax.tree.leaves(abstract.task.frozen['tokenizer'])
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_a_cache_is_assumed_if_that_is_asked_for():
  config = tiny.get_config('generator')
  assert 'image' in dry_run.abstract_task(config).task.example
  config.assumed.cache = True
  abstract = dry_run.abstract_task(config)
  assert 'a cache of codes (data.cache is empty)' in abstract.assumed
  assert 'image' not in abstract.task.example
  assert not abstract.task.frozen


def test_an_assumed_preset_must_exist():
  config = tiny.get_config('generator')
  config.assumed.tokenizer = 'nothing'
  with pytest.raises(errors.ConfigError, match='wanted a preset of configs'):
    dry_run.abstract_task(config)


def test_shapes_become_numbers_and_numbers_stay():
  tree = {
    'shape': jax.ShapeDtypeStruct((256, 256), np.float32),
    'array': np.arange(3.0, dtype=np.float32),
  }
  placed = dry_run.materialise(tree, sharding.make_mesh(4, 2))
  assert placed['shape'].sharding.spec == P('fsdp')
  assert 0.015 < float(np.std(placed['shape'])) < 0.025
  np.testing.assert_array_equal(placed['array'], tree['array'])
