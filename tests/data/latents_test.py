import json
import pathlib
import pickle
import threading

import numpy as np
import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import latent_files
from tests.data import caches


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  caches.write(folder)
  return folder


@pytest.fixture
def source(folder):
  return data.open_latents(folder, 'train')


@pytest.fixture
def cache(tmp_path):
  caches.write(tmp_path)
  return tmp_path


def _shard(folder, shard=1) -> pathlib.Path:
  return folder / f'train-{shard:05d}-of-00003.array_record'


def test_elements_are_those_that_were_encoded(source):
  images = caches.images()
  assert isinstance(source, data.Source)
  assert len(source) == len(images) == 50
  assert source.fingerprint == images.fingerprint
  assert source.class_names == images.class_names
  assert source.image_size == caches.SIZE
  for i in (0, 16, 17, 49):
    element = source[i]
    assert element.pop('label') == images[i]['label']
    assert element.keys() == caches.SHAPES.keys()
    for name, value in caches.encode(images[i]['image']).items():
      assert element[name].dtype == np.float32
      np.testing.assert_array_equal(element[name], value)
      for side in (0, 1):
        one = source.side(i, side)
        np.testing.assert_array_equal(one[name], value[side])
        assert one['label'] == images[i]['label']
        assert one['label'].dtype == np.int32


def test_half_precision_is_close(tmp_path):
  caches.write(tmp_path, caches.index_of('float16'))
  source = data.open_latents(tmp_path, 'train')
  wanted = caches.encode(caches.images()[3]['image'])['codes']
  np.testing.assert_allclose(source[3]['codes'], wanted, atol=5e-4)


@pytest.mark.parametrize('index', [-1, 50])
def test_other_indices_are_refused(source, index):
  with pytest.raises(IndexError):
    source[index]


def test_copies_and_threads_read_the_same(source):
  copy = pickle.loads(pickle.dumps(source))
  wanted = [source[i]['codes'] for i in range(50)]
  seen = {}

  def read(name, source):
    seen[name] = [source[i]['codes'] for i in range(50)]

  threads = [
    threading.Thread(target=read, args=(i, copy if i % 2 else source))
    for i in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for codes in seen.values():
    np.testing.assert_array_equal(codes, wanted)


def test_logs_tell_folder_and_split(source, folder):
  assert f'token cache {folder} (train): 50 images' in data.describe(source)


def test_fields_can_be_chosen(source):
  chosen = source.select(['codes', 'cls'])
  assert chosen.names == ('codes', 'cls')
  assert set(chosen[0]) == set(chosen.side(0, 1)) == {'codes', 'cls', 'label'}
  np.testing.assert_array_equal(chosen[9]['cls'], source[9]['cls'])
  with pytest.raises(errors.DataError, match='no depth, but cls, codes'):
    source.select(['codes', 'depth'])


def _wanted(*names, **changes):
  shapes = {name: caches.SHAPES[name] for name in names} | changes
  return {name: caches.Shape(shape) for name, shape in shapes.items()}


def test_what_would_be_made_again_is_accepted(source):
  source.check('abc', 'hog', 'float32', caches.Wanted(_wanted(*caches.SHAPES)))
  # Of a teacher that has no part in what is read nothing matters.
  source.check('abc', '', 'float32', caches.Wanted(_wanted('codes'), 'off'))
  source.check(
    'abc', 'hog', 'float32', caches.Wanted(_wanted('codes', 'cls'), 'off')
  )


@pytest.mark.parametrize(
  ('tokenizer', 'teacher', 'wanted', 'message'),
  [
    ('xyz', 'hog', caches.Wanted(_wanted('codes')), 'tokenizer=abc, this'),
    ('abc', 'dct', caches.Wanted(_wanted('codes', 'cls')), 'teacher=hog'),
    (
      'abc',
      'hog',
      caches.Wanted(_wanted('codes', 'targets'), 'pool'),
      'align_mode=repeat, this training has pool; give it the same',
    ),
    (
      'abc',
      'hog',
      caches.Wanted(_wanted('codes', targets=(2, 6))),
      r'targets=\(2, 5\), this training has \(2, 6\)',
    ),
    ('abc', 'hog', caches.Wanted(_wanted(depth=(1,))), 'holds no depth'),
  ],
  ids=['tokenizer', 'teacher', 'align', 'shape', 'field'],
)
def test_what_would_be_made_otherwise_is_refused(
  tokenizer, teacher, wanted, message, source
):
  with pytest.raises(errors.DataError, match=message):
    source.check(tokenizer, teacher, 'float32', wanted)


def test_crops_and_other_sizes_are_refused(source):
  source.check_use(8, random_crop=False)
  with pytest.raises(errors.ConfigError, match='set data.random_crop=False'):
    source.check_use(8, random_crop=True)
  with pytest.raises(errors.ConfigError, match='set data.image_size=8'):
    source.check_use(16, random_crop=False)


def test_folders_without_a_cache_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match='is no token cache'):
    data.open_latents(tmp_path / 'nothing', 'train')


def test_splits_that_are_not_there_are_refused(cache):
  with pytest.raises(errors.DataError, match='--splits=val'):
    data.open_latents(cache, 'val')


def test_incomplete_splits_are_refused(cache):
  (cache / 'train.json').unlink()
  _shard(cache).unlink()
  with pytest.raises(
    errors.DataError, match='incomplete: 2 of 3 shards.*run launch.encode again'
  ):
    data.open_latents(cache, 'train')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda data: data[:-1], r'has \d+ bytes, wanted \d+; run launch.encode'),
    (lambda data: data + b'0', r'has \d+ bytes, wanted \d+; run launch.encode'),
    (None, 'has no bytes, wanted'),
  ],
  ids=['cut', 'longer', 'gone'],
)
def test_shards_of_another_size_are_refused(damage, message, cache):
  file = _shard(cache)
  if damage is None:
    file.unlink()
  else:
    file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(errors.DataError, match=message):
    data.open_latents(cache, 'train')


def test_changed_bytes_are_found_when_they_are_read(cache):
  file = _shard(cache)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  source = data.open_latents(cache, 'train')
  assert source[0]['label'] == caches.images()[0]['label']
  with pytest.raises(
    errors.DataError, match='00001-of-00003.array_record is damaged.*delete it'
  ):
    [source[i] for i in range(16, 33)]


def test_index_that_was_changed_is_refused(cache):
  index = latent_files.read_index(cache)
  told = index.to_json()
  told['made_by']['tokenizer'] = 'another'
  latent_files.write_json(cache / 'cache.json', told)
  with pytest.raises(errors.DataError, match='was changed since train was'):
    data.open_latents(cache, 'train')


@pytest.mark.parametrize(
  'change', [{'bytes': [1, 2]}, {'statistics': {}}, {'bytes': None}]
)
def test_damaged_ends_of_splits_are_refused(change, cache):
  path = cache / 'train.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.DataError, match=r'train.json is damaged'):
    data.open_latents(cache, 'train')
