import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfboottok_jax import errors, sizes
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


def test_rectangles_are_counted_in_patches():
  config = tiny.get_config('tokenizer')
  config.data.image_size = (24, 16)
  task = dry_run.abstract_task(config).task
  assert task.example['image'].shape == (24, 16, 3)
  assert task.model.num_tokens == 6
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])
  table = shapes['tokenizer']['encoder']['patch_positions']
  assert table.shape == (1, 6, 16)


@pytest.mark.parametrize(
  ('size', 'positions'), [((32, 48), '2x3'), ((48, 32), '3x2'), (32, '2d')]
)
def test_codes_of_an_autoencoder_lie_in_its_grid(size, positions):
  config = tiny.get_config('generator')
  config.tokenizer, config.data.image_size = 'vavae_tiny:random', size
  task = dry_run.abstract_task(config).task
  model, rows = task.model, sizes.grid(sizes.pair(size), 16)
  assert (model.positions, model.grid) == (positions, rows)
  assert model.num_tokens == rows[0] * rows[1]
  # The teacher has as many patches.
  assert task.encoders.shapes['targets'].shape[0] == model.num_tokens


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
