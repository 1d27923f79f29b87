import math

import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import cores, picture_set, token_cache, workers
from tests.data import caches


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """Pretends a number of cores, and a container's quota in words."""

  def pretend(count, quota='max 100000'):
    monkeypatch.setattr(cores, 'core_ids', lambda: frozenset(range(count)))
    (tmp_path / 'cpu.max').write_text(f'{quota}\n')
    monkeypatch.setattr(cores, '_QUOTA', tmp_path / 'cpu.max')
    monkeypatch.setattr(cores, 'free_shared_memory', lambda: 2.0**30)

  return pretend


def _photos(count):
  class Listed(picture_set.PictureSource):
    class_names, fingerprint = (), ''

    def __init__(self):
      pass

    def __len__(self):
      return count

  return Listed()


def test_the_cores_are_those_that_the_system_allows():
  assert 1 <= cores.count_cores() <= len(cores.core_ids())


@pytest.mark.parametrize(
  ('count', 'quota', 'shared_by', 'wanted'),
  [
    (16, 'max 100000', 1, 16),
    (16, 'max 100000', 3, 5),
    (2, 'max 100000', 4, 1),
    # Two and a half cores of a container.
    (16, '250000 100000', 1, 2),
    (16, '50000 100000', 1, 1),
    (4, '800000 100000', 1, 4),
    (4, 'of another version', 1, 4),
  ],
)
def test_cores_are_shared_and_limited(machine, count, quota, shared_by, wanted):
  machine(count, quota)
  assert cores.count_cores(shared_by) == wanted


def test_without_containers_there_is_no_quota(machine, tmp_path, monkeypatch):
  machine(6)
  monkeypatch.setattr(cores, '_QUOTA', tmp_path / 'none')
  assert cores.count_cores() == 6


@pytest.mark.parametrize(
  ('count', 'wanted'),
  [
    # As many threads as always on small machines, and no process.
    (1, (4, 0)),
    (2, (4, 0)),
    (6, (6, 0)),
    (8, (4, 1)),
    (16, (4, 3)),
    (32, (4, 7)),
    (256, (4, 16)),
  ],
)
def test_many_pictures_are_read_with_all_cores(machine, count, wanted):
  machine(count)
  assert cores.choose(_photos(1_000_000)) == wanted


def test_numbers_that_are_given_stay(machine):
  machine(32)
  source = _photos(1_000_000)
  assert cores.choose(source, 3, 5) == (3, 5)
  assert cores.choose(source, 0, 0) == (0, 0)
  # The other one fits it.
  assert cores.choose(source, 10) == (10, 3)
  assert cores.choose(source, 0) == (0, 16)
  assert cores.choose(source, num_workers=0) == (16, 0)
  assert cores.choose(source, num_workers=2) == (4, 2)


def test_processes_of_a_machine_share_its_cores(machine):
  machine(32)
  source = _photos(1_000_000)
  assert cores.choose(source, shared_by=2) == (4, 3)
  assert cores.choose(source, shared_by=8) == (4, 0)


def test_little_data_and_scenes_need_no_processes(machine, tmp_path):
  machine(32)
  caches.write(tmp_path)
  for source in (
    _photos(cores.LEAST_PICTURES - 1),
    data.ProceduralSource('train', 8, length=1_000_000),
    data.open_token_cache(tmp_path, 'train'),
  ):
    assert cores.choose(source) == (16, 0)
  assert cores.choose(_photos(cores.LEAST_PICTURES)) == (4, 7)


def test_a_large_cache_is_read_by_processes(machine, tmp_path, monkeypatch):
  machine(32)
  caches.write(tmp_path)
  cache = data.open_token_cache(tmp_path, 'train')
  monkeypatch.setattr(
    token_cache.TokenCache, '__len__', lambda self: cores.LEAST_RECORDS
  )
  assert cores.choose(cache) == (4, 7)


def test_workers_need_shared_memory(machine, monkeypatch, tmp_path):
  machine(16)
  source = _photos(cores.LEAST_PICTURES)
  assert cores.choose(source, batch_bytes=2**27) == (4, 3)
  # Two batches of each of three workers are more than a gigabyte.
  assert cores.choose(source, batch_bytes=2**28) == (16, 0)
  # What was asked for is done.
  assert cores.choose(source, num_workers=3, batch_bytes=2**28) == (4, 3)
  monkeypatch.undo()
  assert cores.free_shared_memory() > 0
  # Linux has memory that /dev/shm does not limit.
  assert (cores.free_shared_memory() == math.inf) >= workers.HAS_MEMFD
  monkeypatch.setattr(workers, 'HAS_MEMFD', False)
  if cores._SHARED_MEMORY.is_dir():
    assert 0 < cores.free_shared_memory() < math.inf
  monkeypatch.setattr(cores, '_SHARED_MEMORY', tmp_path / 'none')
  assert cores.free_shared_memory() == float('inf')


@pytest.mark.parametrize('name', ['num_threads', 'num_workers'])
def test_negative_numbers_are_refused(name):
  with pytest.raises(
    errors.ConfigError, match=rf'data\.{name}=-2; wanted 0 or more, or -1'
  ):
    cores.choose(_photos(1), **{name: -2})
