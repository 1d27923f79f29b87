import dataclasses
import json
import pathlib
import pickle
import threading

import numpy as np
import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import token_cache
from tests.data import caches


@pytest.mark.parametrize(
  ('count', 'shards'), [(1, 1), (7, 7), (50, 3), (9, 4), (1000, 7)]
)
def test_shards_hold_every_image_once(count, shards):
  split = token_cache.Split(count, shards, '')
  spans = [split.bounds(shard) for shard in range(shards)]
  assert [i for first, end in spans for i in range(first, end)] == list(
    range(count)
  )
  for shard, (first, end) in enumerate(spans):
    assert end > first
    assert {split.shard_of(i) for i in range(first, end)} == {shard}


@pytest.mark.parametrize('dtype', token_cache.DTYPES)
def test_records_come_back_as_they_were(dtype):
  index = caches.index_of(dtype)
  rng = np.random.default_rng(0)
  fields = {
    name: rng.normal(size=(4, 2, *shape)).astype(dtype)
    for name, shape in caches.SHAPES.items()
  }
  labels = np.array([3, 0, 9, 2**31 - 1], np.int32)
  records = token_cache.pack(index, fields, labels)
  for i, record in enumerate(records):
    assert len(record) == index.record_bytes
    both = token_cache.unpack(index, record, list(fields), slice(None))
    assert both['label'] == labels[i]
    for name, values in fields.items():
      assert both[name].dtype == np.float32
      np.testing.assert_array_equal(both[name], values[i].astype(np.float32))
    one = token_cache.unpack(index, record, ['targets'], slice(1, 2))
    assert set(one) == {'targets', 'label'}
    np.testing.assert_array_equal(one['targets'], both['targets'][1:])


def test_a_record_is_its_arrays_little_endian_and_the_label():
  index = dataclasses.replace(
    caches.index_of('float16'), shapes={'codes': (2,)}
  )
  codes = np.array([[[1.0, -2.0], [0.5, 65504.0]]], '>f4')
  (record,) = token_cache.pack(index, {'codes': codes}, np.array([258], '>i8'))
  assert record == bytes.fromhex('003c 00c0 0038 ff7b 02010000')


@pytest.mark.parametrize('dtype', token_cache.DTYPES)
def test_sides_have_records_of_their_own(dtype):
  index = caches.index_of(dtype, apart=True)
  rng = np.random.default_rng(0)
  fields = {
    name: rng.normal(size=(3, 2, *shape)).astype(dtype)
    for name, shape in caches.SHAPES.items()
  }
  labels = np.array([3, 0, 9], np.int32)
  records = token_cache.pack(index, fields, labels)
  assert len(records) == 6
  for i, record in enumerate(records):
    assert len(record) == index.record_bytes
    one = token_cache.unpack(index, record, ['codes', 'cls'], slice(None))
    assert one['label'] == labels[i // 2]
    assert set(one) == {'codes', 'cls', 'label'}
    for name in ('codes', 'cls'):
      wanted = fields[name][i // 2, i % 2].astype(np.float32)
      np.testing.assert_array_equal(one[name], wanted[None])
  # Half of the bytes that an image has, but for the label.
  both = dataclasses.replace(index, apart=False).record_bytes
  assert 2 * (index.record_bytes - 4) == both - 4


def test_half_precision_errs_by_half_of_its_last_bit():
  index = caches.index_of('float16', apart=True)
  rng = np.random.default_rng(0)
  # From 2^-12 to 2^12, all of which have full precision in float16.
  codes = rng.normal(size=(2, 2, *caches.SHAPES['codes']))
  codes = np.sign(codes) * 2.0 ** rng.uniform(-12, 12, codes.shape)
  fields = {n: np.zeros((2, 2, *s)) for n, s in caches.SHAPES.items()}
  records = token_cache.pack(index, {**fields, 'codes': codes}, np.zeros(2))
  for i, record in enumerate(records):
    found = token_cache.unpack(index, record, ['codes'], slice(None))['codes']
    assert found.dtype == np.float32
    wanted = codes[i // 2, i % 2][None]
    np.testing.assert_allclose(found, wanted, rtol=2**-11)
    assert np.any(found != wanted)


@pytest.mark.parametrize('apart', [False, True])
def test_index_comes_back_from_json(apart):
  index = caches.index_of('float16', apart=apart)
  told = json.loads(json.dumps(index.to_json()))
  assert token_cache.Index.from_json(told) == index
  assert told['fields'][1] == {
    'name': 'codes', 'shape': [2, 8, 24], 'dtype': 'float16',
  }  # fmt: skip
  assert told['fields'][-1]['name'] == 'label'
  assert told['version'] == (2 if apart else 1)


@pytest.mark.parametrize(
  'change',
  [
    {'fields': []},
    {'splits': None},
    {'made_by': {'tokenizer': 'abc'}},
    {'more': 1},
    {'class_names': 'ab'},
  ],
  ids=lambda change: next(iter(change)),
)
def test_other_objects_are_no_index(change):
  told = json.loads(json.dumps(caches.index_of().to_json())) | change
  with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):
    token_cache.Index.from_json(told)


def test_digest_is_of_its_split_and_all_that_is_common():
  index = caches.index_of(train=caches.images(), val=caches.images('val'))
  alone = caches.index_of(train=caches.images())
  assert index.digest('train') == alone.digest('train')
  assert index.digest('train') != index.digest('val')
  other = dataclasses.replace(index, class_names=('a',))
  assert index.digest('train') != other.digest('train')


def test_differences_name_what_differs():
  index = caches.index_of('float16')
  assert index.differences(index) == []
  other = dataclasses.replace(
    caches.index_of(shards=4), made_by={**caches.MADE_BY, 'tokenizer': 'x' * 64}
  )
  differences = index.differences(other)
  assert f'made_by.tokenizer is abc there, {"x" * 37}... here' in differences
  assert 'splits.train.shards is 3 there, 4 here' in differences
  assert 'fields.codes.dtype is float16 there, float32 here' in differences
  other = dataclasses.replace(index, apart=True)
  assert index.differences(other) == ['version is 1 there, 2 here']
  # A split that only one has is no contradiction.
  val = caches.index_of('float16', val=caches.images('val'))
  assert index.differences(val) == []


@pytest.mark.parametrize('shards', [0, -1, 51])
def test_shards_without_images_are_refused(shards):
  with pytest.raises(errors.ConfigError, match=f'--shards={shards} of the 50'):
    caches.index_of(shards=shards)


def test_other_types_are_refused():
  with pytest.raises(errors.ConfigError, match='--dtype=bfloat16; wanted one'):
    caches.index_of('bfloat16')


def test_names_tell_split_and_shard(tmp_path):
  index = caches.index_of()
  file = token_cache.record_file(tmp_path, index, 'train', 2)
  assert file == tmp_path / 'train-00002-of-00003.array_record'
  assert token_cache.split_file(tmp_path, 'val') == tmp_path / 'val.json'


def test_index_is_read_as_it_was_written(tmp_path):
  index = caches.index_of()
  folder = tmp_path / 'deep' / 'cache'
  token_cache.write_index(folder, index)
  assert token_cache.read_index(folder) == index
  assert [path.name for path in folder.iterdir()] == ['cache.json']


def test_same_contents_stay_as_they_are(tmp_path):
  path = tmp_path / 'x.json'
  token_cache.write_json(path, {'a': 1})
  before = path.stat()
  token_cache.write_json(path, {'a': 1})
  assert path.stat().st_ino == before.st_ino
  token_cache.write_json(path, {'a': 2})
  assert token_cache.read_json(path) == {'a': 2}


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (None, 'is no token cache: it has no cache.json'),
    ('', 'cache.json is damaged .*; restore it, or encode into a new folder'),
    ('[1]', 'damaged .it holds no object'),
    ('{"version": 3}', 'is of version 3; wanted 1 or 2'),
    ('{"version": 1}', "damaged .'fields'"),
  ],
)
def test_no_index_is_a_data_error(text, message, tmp_path):
  if text is not None:
    (tmp_path / 'cache.json').write_text(text)
  with pytest.raises(errors.DataError, match=message):
    token_cache.read_index(tmp_path)


def test_changed_index_is_a_data_error(tmp_path):
  token_cache.write_index(tmp_path, caches.index_of())
  path = tmp_path / 'cache.json'
  told = json.loads(path.read_text())
  told['fields'][0]['dtype'] = 'int8'
  path.write_text(json.dumps(told))
  with pytest.raises(errors.DataError, match='damaged .--dtype=int8'):
    token_cache.read_index(tmp_path)


def test_new_and_empty_folders_and_their_own_are_agreed(tmp_path):
  index = caches.index_of()
  folder = tmp_path / 'cache'
  assert token_cache.agree(folder, index) == index
  folder.mkdir()
  # This is how a command that is killed at once leaves the folder.
  (folder / '.cache.json.123.partial').touch()
  assert token_cache.agree(folder, index) == index
  token_cache.write_index(folder, index)
  assert token_cache.agree(folder, index) == index


def test_another_split_joins_those_that_are_there(tmp_path):
  token_cache.write_index(tmp_path, caches.index_of())
  val = caches.index_of(val=caches.images('val', 20), shards=2)
  agreed = token_cache.agree(tmp_path, val)
  assert {k: s.count for k, s in agreed.splits.items()} == {
    'train': 50, 'val': 20,
  }  # fmt: skip


def test_other_folders_are_refused(tmp_path):
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(errors.ConfigError, match='holds no cache.json; choose'):
    token_cache.agree(tmp_path, caches.index_of())


def test_other_settings_are_refused(tmp_path):
  token_cache.write_index(tmp_path, caches.index_of('float16'))
  with pytest.raises(
    errors.ConfigError, match=r'dtype is float16 there, float32 here;.*other f'
  ):
    token_cache.agree(tmp_path, caches.index_of('float32'))
  with pytest.raises(errors.ConfigError, match='and 1 more'):
    token_cache.agree(tmp_path, caches.index_of('float32', shards=2))


def _codes():
  rng = np.random.default_rng(0)
  scales, shifts = np.array([0.5, 2.0, 3.0]), np.array([-1.0, 0.0, 10.0])
  return rng.normal(size=(40, 4, 3)) * scales + shifts


def test_statistics_are_numpys_however_the_codes_are_cut():
  codes = _codes().astype(np.float32)
  parts = []
  for part in np.split(codes, [10, 11, 30]):
    sums = token_cache.Sums()
    for batch in np.array_split(part, 2):
      if len(batch):
        sums.add(batch)
    # The file keeps nothing else of them.
    told = json.loads(json.dumps(sums.to_json()))
    parts.append(token_cache.Sums(**told))
  actual = token_cache.combine(parts)
  wide = codes.astype(np.float64)
  assert actual.count == 40
  np.testing.assert_allclose(actual.mean, wide.mean(), rtol=1e-12)
  np.testing.assert_allclose(actual.std, wide.std(), rtol=1e-12)
  np.testing.assert_allclose(actual.channel_mean, wide.mean((0, 1)), rtol=1e-12)
  np.testing.assert_allclose(actual.channel_std, wide.std((0, 1)), rtol=1e-10)


def test_half_precision_is_summed_in_double():
  codes = np.full((4000, 4, 2), 0.1, np.float16)
  sums = token_cache.Sums()
  sums.add(codes)
  actual = token_cache.combine([sums])
  np.testing.assert_allclose(actual.mean, np.float64(codes[0, 0, 0]))
  assert actual.std < 1e-7


def test_statistics_come_back_from_json():
  sums = token_cache.Sums()
  sums.add(_codes())
  statistics = token_cache.combine([sums])
  told = json.loads(json.dumps(dataclasses.asdict(statistics)))
  assert token_cache.Statistics.from_json(told) == statistics


@pytest.fixture(scope='module', params=[False, True], ids=['old', 'apart'])
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  caches.write(folder, caches.index_of(apart=request.param))
  return folder


@pytest.fixture
def source(folder):
  return data.open_token_cache(folder, 'train')


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
  source = data.open_token_cache(tmp_path, 'train')
  wanted = caches.encode(caches.images()[3]['image'])['codes']
  np.testing.assert_allclose(source[3]['codes'], wanted, atol=5e-4)


def test_one_side_costs_the_bytes_of_one_side(tmp_path, monkeypatch):
  read = []
  unpack = token_cache.unpack

  def watched(index, record, *args):
    read.append(len(record))
    return unpack(index, record, *args)

  monkeypatch.setattr(token_cache, 'unpack', watched)
  index = caches.index_of(apart=True)
  caches.write(tmp_path, index)
  source = data.open_token_cache(tmp_path, 'train')
  source.side(17, 1)
  assert read == [index.record_bytes]
  source[17]
  assert read[1:] == [index.record_bytes] * 2


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


def _wanted(*names, mode='repeat', **changes):
  shapes = {name: caches.SHAPES[name] for name in names} | changes
  return {name: caches.Shape(shape) for name, shape in shapes.items()}, mode


def test_what_would_be_made_again_is_accepted(source):
  source.check('abc', 'hog', 'float32', *_wanted(*caches.SHAPES))
  # The teacher does not matter where neither of the fields read is its own.
  source.check('abc', '', 'float32', *_wanted('codes', mode='off'))
  source.check('abc', 'hog', 'float32', *_wanted('codes', 'cls', mode='off'))


@pytest.mark.parametrize(
  ('tokenizer', 'teacher', 'wanted', 'message'),
  [
    ('xyz', 'hog', _wanted('codes'), 'tokenizer=abc, this'),
    ('abc', 'dct', _wanted('codes', 'cls'), 'teacher=hog'),
    (
      'abc',
      'hog',
      _wanted('codes', 'targets', mode='pool'),
      'align_mode=repeat, this training has pool; give it the same',
    ),
    (
      'abc',
      'hog',
      _wanted('codes', targets=(2, 6)),
      r'targets=\(2, 5\), this training has \(2, 6\)',
    ),
    ('abc', 'hog', _wanted(depth=(1,)), 'holds no depth'),
  ],
  ids=['tokenizer', 'teacher', 'align', 'shape', 'field'],
)
def test_what_would_be_made_otherwise_is_refused(
  tokenizer, teacher, wanted, message, source
):
  with pytest.raises(errors.DataError, match=message):
    source.check(tokenizer, teacher, 'float32', *wanted)


def test_crops_and_other_sizes_are_refused(source):
  source.check_use(8, random_crop=False)
  with pytest.raises(errors.ConfigError, match='set data.random_crop=False'):
    source.check_use(8, random_crop=True)
  with pytest.raises(errors.ConfigError, match='set data.image_size=8'):
    source.check_use(16, random_crop=False)


def test_an_index_of_rectangles_comes_back():
  index = dataclasses.replace(caches.index_of(), image_size=(8, 12))
  content = json.loads(json.dumps(index.to_json()))
  assert content['image_size'] == [8, 12]
  again = token_cache.Index.from_json(content)
  assert again == index
  assert again.image_size == (8, 12)
  turned = dataclasses.replace(index, image_size=(12, 8))
  assert index.digest('train') != turned.digest('train')
  assert index.differences(turned)
  # That of squares is the number that it was.
  assert caches.index_of().to_json()['image_size'] == caches.SIZE


def test_rectangles_take_no_cache_of_another(tmp_path):
  index = dataclasses.replace(caches.index_of(), image_size=(8, 12))
  caches.write(tmp_path, index)
  source = data.open_token_cache(tmp_path, 'train')
  source.check_use((8, 12), random_crop=False)
  for size in (8, (12, 8)):
    with pytest.raises(errors.ConfigError, match='set data.image_size=8,12'):
      source.check_use(size, random_crop=False)


def test_folders_without_a_cache_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match='is no token cache'):
    data.open_token_cache(tmp_path / 'nothing', 'train')


def test_splits_that_are_not_there_are_refused(cache):
  with pytest.raises(errors.DataError, match='--splits=val'):
    data.open_token_cache(cache, 'val')


def test_incomplete_splits_are_refused(cache):
  (cache / 'train.json').unlink()
  _shard(cache).unlink()
  with pytest.raises(
    errors.DataError, match='incomplete: 2 of 3 shards.*run launch.encode again'
  ):
    data.open_token_cache(cache, 'train')


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
    data.open_token_cache(cache, 'train')


def test_changed_bytes_are_found_when_they_are_read(cache):
  file = _shard(cache)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  source = data.open_token_cache(cache, 'train')
  assert source[0]['label'] == caches.images()[0]['label']
  with pytest.raises(
    errors.DataError, match='00001-of-00003.array_record is damaged.*delete it'
  ):
    [source[i] for i in range(16, 33)]


def test_index_that_was_changed_is_refused(cache):
  index = token_cache.read_index(cache)
  told = index.to_json()
  told['made_by']['tokenizer'] = 'another'
  token_cache.write_json(cache / 'cache.json', told)
  with pytest.raises(errors.DataError, match='was changed since train was'):
    data.open_token_cache(cache, 'train')


@pytest.mark.parametrize(
  'change', [{'bytes': [1, 2]}, {'statistics': {}}, {'bytes': None}]
)
def test_damaged_ends_of_splits_are_refused(change, cache):
  path = cache / 'train.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.DataError, match=r'train.json is damaged'):
    data.open_token_cache(cache, 'train')
