import pytest

from selfboottok_jax import errors
from selfboottok_jax.stages import data_benchmark, inputs
from selfboottok_jax.training import sharding
from tests.launch import tiny

# A whole benchmark is run in tests/launch/benchmark_test.py.


@pytest.mark.parametrize(
  ('slower', 'wanted'),
  [
    ({}, 'model'),
    ({'transfer': 9.0}, 'transfer'),
    ({'pipeline': 9.0}, 'decoding'),
    ({'pipeline': 9.0, 'resizing': 0.4}, 'resizing'),
    ({'pipeline': 9.0, 'batching': 0.4}, 'batching'),
    # They may be the most of a pipeline that keeps up all the same.
    ({'resizing': 0.4}, 'model'),
  ],
)
def test_the_slowest_part_sets_the_pace(slower, wanted):
  each = {'model': 5.0, 'transfer': 1.0, 'pipeline': 3.0}
  each |= {'decoding': 0.3, 'resizing': 0.2, 'batching': 0.01}
  assert data_benchmark.bound_by(each | slower) == wanted
  assert wanted in data_benchmark._ADVICE


def test_without_images_there_is_nothing_to_time():
  config = tiny.get_config('tokenizer')
  config.data.source = 'auto'
  with pytest.raises(errors.ConfigError, match='config.data.path=PHOTOS'):
    data_benchmark.measure(config, 1, 1)


def test_every_part_of_a_picture_is_timed(photos):
  config = tiny.get_config('tokenizer')
  config.data.source, config.data.path = 'auto', str(photos)
  mesh = sharding.make_mesh()
  config.data.batch_size = 2 * mesh.size
  source, seconds = inputs.open_data(config, 'train'), data_benchmark._Seconds()
  for _ in range(3):
    data_benchmark._time_parts(config, source, mesh, seconds)
  for name in ('decoding', 'resizing', 'batching', 'transfer'):
    taken = getattr(seconds, name)
    assert len(taken) == 3
    assert min(taken) > 0


def test_pipelines_are_compared_with_threads_and_with_processes(
  photos, monkeypatch
):
  config = tiny.get_config('tokenizer')
  config.data.source, config.data.path = 'auto', str(photos)
  source = inputs.open_data(config, 'train')
  monkeypatch.setattr(data_benchmark.cores, 'core_ids', lambda: {0, 1})
  kinds = data_benchmark._kinds(config, source)
  assert kinds['pipeline'] == kinds['threads']
  assert kinds['threads']['num_workers'] == 0
  assert kinds['workers'] == {'num_threads': 1, 'num_workers': 2}
  config.data.num_workers, config.data.num_threads = 3, 2
  kinds = data_benchmark._kinds(config, source)
  assert kinds['pipeline'] == {'num_threads': 2, 'num_workers': 3}
  assert kinds['workers']['num_workers'] == 3
