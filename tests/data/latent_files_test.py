import json

import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import latent_files
from tests.data import caches


def test_names_tell_split_and_shard(tmp_path):
  index = caches.index_of()
  file = latent_files.record_file(tmp_path, index, 'train', 2)
  assert file == tmp_path / 'train-00002-of-00003.array_record'
  assert latent_files.split_file(tmp_path, 'val') == tmp_path / 'val.json'


def test_index_is_read_as_it_was_written(tmp_path):
  index = caches.index_of()
  folder = tmp_path / 'deep' / 'cache'
  latent_files.write_index(folder, index)
  assert latent_files.read_index(folder) == index
  assert [path.name for path in folder.iterdir()] == ['cache.json']


def test_same_contents_stay_as_they_are(tmp_path):
  path = tmp_path / 'x.json'
  latent_files.write_json(path, {'a': 1})
  before = path.stat()
  latent_files.write_json(path, {'a': 1})
  assert path.stat().st_ino == before.st_ino
  latent_files.write_json(path, {'a': 2})
  assert latent_files.read_json(path) == {'a': 2}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (None, 'is no token cache: it has no cache.json'),
    ('', 'cache.json is damaged .*; restore it, or encode into a new folder'),
    ('[1]', 'damaged .it holds no object'),
    ('{"version": 2}', 'is of version 2; wanted 1'),
    ('{"version": 1}', "damaged .'fields'"),
  ],
)
def test_no_index_is_a_data_error(text, message, tmp_path):
  if text is not None:
    (tmp_path / 'cache.json').write_text(text)
  with pytest.raises(errors.DataError, match=message):
    latent_files.read_index(tmp_path)


def test_changed_index_is_a_data_error(tmp_path):
  latent_files.write_index(tmp_path, caches.index_of())
  path = tmp_path / 'cache.json'
  told = json.loads(path.read_text())
  told['fields'][0]['dtype'] = 'int8'
  path.write_text(json.dumps(told))
  with pytest.raises(errors.DataError, match='damaged .--dtype=int8'):
    latent_files.read_index(tmp_path)


def test_new_and_empty_folders_and_their_own_are_agreed(tmp_path):
  index = caches.index_of()
  folder = tmp_path / 'cache'
  assert latent_files.agree(folder, index) == index
  folder.mkdir()
  # As a command leaves it that was killed at once.
  (folder / '.cache.json.123.partial').touch()
  assert latent_files.agree(folder, index) == index
  latent_files.write_index(folder, index)
  assert latent_files.agree(folder, index) == index


def test_another_split_joins_those_that_are_there(tmp_path):
  latent_files.write_index(tmp_path, caches.index_of())
  val = caches.index_of(val=caches.images('val', 20), shards=2)
  agreed = latent_files.agree(tmp_path, val)
  assert {k: s.count for k, s in agreed.splits.items()} == {
    'train': 50, 'val': 20,
  }  # fmt: skip


def test_other_folders_are_refused(tmp_path):
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(errors.ConfigError, match='holds no cache.json; choose'):
    latent_files.agree(tmp_path, caches.index_of())


def test_other_settings_are_refused(tmp_path):
  latent_files.write_index(tmp_path, caches.index_of('float16'))
  with pytest.raises(
    errors.ConfigError, match=r'dtype is float16 there, float32 here;.*other f'
  ):
    latent_files.agree(tmp_path, caches.index_of('float32'))
  with pytest.raises(errors.ConfigError, match='and 1 more'):
    latent_files.agree(tmp_path, caches.index_of('float32', shards=2))
