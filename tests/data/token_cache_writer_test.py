import dataclasses
import resource
import shutil
import signal

import numpy as np
import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import token_cache, token_cache_writer
from tests.data import caches


@pytest.fixture(params=[False, True], ids=['old', 'apart'])
def index(request, tmp_path):
  index = caches.index_of(apart=request.param)
  token_cache.write_index(tmp_path, index)
  return index


def _statistics(codes):
  wide = codes.astype(np.float64)
  return wide.mean(), wide.std(), wide.mean((0, 1)), wide.std((0, 1))


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_statistics_are_of_the_images_as_stored(dtype, tmp_path):
  index = caches.index_of(dtype)
  caches.write(tmp_path, index)
  source = data.open_token_cache(tmp_path, 'train')
  codes = np.stack([source[i]['codes'][0] for i in range(len(source))])
  told = source.statistics
  assert told.count == 50
  mean, std, channel_mean, channel_std = _statistics(codes)
  np.testing.assert_allclose(told.mean, mean, rtol=1e-10)
  np.testing.assert_allclose(told.std, std, rtol=1e-10)
  np.testing.assert_allclose(told.channel_mean, channel_mean, rtol=1e-10)
  np.testing.assert_allclose(told.channel_std, channel_std, rtol=1e-10)


def test_a_shard_that_was_not_closed_is_written_again(index, tmp_path):
  whole = tmp_path / 'whole'
  caches.write(whole, index)
  source = caches.images()
  caches.write_shard(tmp_path, index, 'train', 0, source)
  torn = token_cache_writer.ShardWriter(tmp_path, index, 'train', 1)
  torn.write(*caches.batch_of(source, 16, 20))
  # As after kill -9, nothing is tidied up.
  partial = next(tmp_path.glob('.*.partial'))
  partial = partial.rename(partial.with_suffix('.1.partial'))
  assert token_cache_writer.pending_shards(tmp_path, index, 'train') == [1, 2]
  with pytest.raises(errors.DataError, match='lacks shards of train.*is 1'):
    token_cache_writer.finish(tmp_path, index, 'train')
  caches.write(tmp_path, index)
  assert token_cache_writer.pending_shards(tmp_path, index, 'train') == []
  expected = caches.contents(whole)
  del torn
  (tmp_path / 'whole').rename(tmp_path.parent / f'{tmp_path.name}-whole')
  assert caches.contents(tmp_path) == expected


@pytest.mark.parametrize('damage', ['cut', 'sums', 'no sums', 'settings'])
def test_damaged_shards_are_written_again(damage, index, tmp_path):
  caches.write(tmp_path, index)
  before = caches.contents(tmp_path)
  file = token_cache.record_file(tmp_path, index, 'train', 1)
  sidecar = file.with_suffix('.json')
  if damage == 'cut':
    file.write_bytes(file.read_bytes()[:100])
  elif damage == 'sums':
    sidecar.write_text('{"bytes": 3}')
  elif damage == 'no sums':
    sidecar.unlink()
  else:
    told = token_cache.read_json(sidecar)
    token_cache.write_json(sidecar, told | {'index': 'of another'})
  assert token_cache_writer.pending_shards(tmp_path, index, 'train') == [1]
  caches.write(tmp_path, index)
  assert caches.contents(tmp_path) == before


def test_a_stop_before_the_rename_vouches_for_no_older_records(
  index, tmp_path, monkeypatch
):
  caches.write(tmp_path, index)
  file = token_cache.record_file(tmp_path, index, 'train', 1)
  # Other numbers in a file of the same size, of another cache in that folder.
  file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))

  def stop(self, target):
    raise KeyboardInterrupt

  monkeypatch.setattr(type(file), 'replace', stop)
  with pytest.raises(KeyboardInterrupt):
    caches.write_shard(tmp_path, index, 'train', 1, caches.images())
  monkeypatch.undo()
  assert token_cache_writer.pending_shards(tmp_path, index, 'train') == [1]


def test_abort_leaves_nothing(index, tmp_path):
  writer = token_cache_writer.ShardWriter(tmp_path, index, 'train', 0)
  writer.write(*caches.batch_of(caches.images(), 0, 4))
  writer.abort()
  writer.abort()
  assert sorted(caches.contents(tmp_path)) == ['cache.json']


def test_a_shard_is_whole_or_not_closed(index, tmp_path):
  writer = token_cache_writer.ShardWriter(tmp_path, index, 'train', 0)
  writer.write(*caches.batch_of(caches.images(), 0, 4))
  assert writer.left == 12
  with pytest.raises(ValueError, match='12 images are missing'):
    writer.close()
  fields, labels = caches.batch_of(caches.images(), 4, 8)
  with pytest.raises(ValueError, match='cls is'):
    writer.write({**fields, 'cls': fields['cls'][:, 0]}, labels)
  writer.abort()


@pytest.mark.parametrize(
  ('value', 'dtype'), [(1e5, 'float16'), (np.nan, 'float32')]
)
def test_numbers_that_cannot_be_stored_are_refused(value, dtype, tmp_path):
  index = caches.index_of(dtype)
  writer = token_cache_writer.ShardWriter(tmp_path, index, 'train', 0)
  fields, labels = caches.batch_of(caches.images(), 0, 4)
  writer.write(fields, labels)
  fields['targets'][2, 1, 0, 0] = value
  with pytest.raises(errors.DataError, match='targets of image 6 of train'):
    writer.write(fields, labels)
  writer.abort()


def test_two_commands_in_one_folder_do_not_mix(index, tmp_path):
  first = token_cache_writer.ShardWriter(tmp_path, index, 'train', 0)
  first.write(*caches.batch_of(caches.images(), 0, 16))
  caches.write_shard(tmp_path, index, 'train', 0, caches.images())
  before = caches.contents(tmp_path)
  with pytest.raises(errors.DataError, match='is another launch.encode'):
    first.close()
  assert caches.contents(tmp_path) == before


def test_a_full_disk_is_told(index, tmp_path):
  writer = token_cache_writer.ShardWriter(tmp_path, index, 'train', 0)
  writer.write(*caches.batch_of(caches.images(), 0, 16))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
  try:
    with pytest.raises(errors.DataError, match='cannot be written.*make room'):
      writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)
  writer.abort()
  assert sorted(caches.contents(tmp_path)) == ['cache.json']


@pytest.mark.parametrize('apart', [False, True])
@pytest.mark.parametrize('shapes', [{'codes': (1,)}, {'codes': (400, 100)}])
def test_room_is_estimated_from_above(shapes, apart, tmp_path):
  index = dataclasses.replace(
    caches.index_of(shards=1, apart=apart), shapes=shapes
  )
  writer = token_cache_writer.ShardWriter(tmp_path, index, 'train', 0)
  shape = (50, 2, *shapes['codes'])
  writer.write({'codes': np.zeros(shape)}, np.zeros(50, np.int32))
  writer.close()
  file = token_cache.record_file(tmp_path, index, 'train', 0)
  room = token_cache_writer.check_room(tmp_path / 'new', index, {'train': [0]})
  assert file.stat().st_size <= room <= 1.02 * file.stat().st_size + 2**18


def test_too_little_room_is_told_before_anything_is_written(
  tmp_path, monkeypatch
):
  index = caches.index_of()
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    token_cache_writer.shutil,
    'disk_usage',
    lambda _: usage._replace(free=400_000),
  )
  assert (
    token_cache_writer.check_room(tmp_path, index, {'train': [2]}) < 400_000
  )
  with pytest.raises(errors.DataError, match=r'0.4 MB free; make room'):
    token_cache_writer.check_room(tmp_path, index, {'train': [0, 1, 2]})
  assert token_cache_writer.check_room(tmp_path, index, {'train': []}) == 0
