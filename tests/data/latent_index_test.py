import dataclasses
import json

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import latent_index
from tests.data import caches


@pytest.mark.parametrize(
  ('count', 'shards'), [(1, 1), (7, 7), (50, 3), (9, 4), (1000, 7)]
)
def test_shards_hold_every_image_once(count, shards):
  split = latent_index.Split(count, shards, '')
  spans = [split.bounds(shard) for shard in range(shards)]
  assert [i for first, end in spans for i in range(first, end)] == list(
    range(count)
  )
  for shard, (first, end) in enumerate(spans):
    assert end > first
    assert {split.shard_of(i) for i in range(first, end)} == {shard}


@pytest.mark.parametrize('dtype', latent_index.DTYPES)
def test_records_come_back_as_they_were(dtype):
  index = caches.index_of(dtype)
  rng = np.random.default_rng(0)
  fields = {
    name: rng.normal(size=(4, 2, *shape)).astype(dtype)
    for name, shape in caches.SHAPES.items()
  }
  labels = np.array([3, 0, 9, 2**31 - 1], np.int32)
  records = latent_index.pack(index, fields, labels)
  for i, record in enumerate(records):
    assert len(record) == index.record_bytes
    both = latent_index.unpack(index, record, list(fields), slice(None))
    assert both['label'] == labels[i]
    for name, values in fields.items():
      assert both[name].dtype == np.float32
      np.testing.assert_array_equal(both[name], values[i].astype(np.float32))
    one = latent_index.unpack(index, record, ['targets'], slice(1, 2))
    assert set(one) == {'targets', 'label'}
    np.testing.assert_array_equal(one['targets'], both['targets'][1:])


def test_a_record_is_its_arrays_little_endian_and_the_label():
  index = dataclasses.replace(
    caches.index_of('float16'), shapes={'codes': (2,)}
  )
  codes = np.array([[[1.0, -2.0], [0.5, 65504.0]]], '>f4')
  (record,) = latent_index.pack(index, {'codes': codes}, np.array([258], '>i8'))
  assert record == bytes.fromhex('003c 00c0 0038 ff7b 02010000')


def test_index_comes_back_from_json():
  index = caches.index_of('float16')
  told = json.loads(json.dumps(index.to_json()))
  assert latent_index.Index.from_json(told) == index
  assert told['fields'][1] == {
    'name': 'codes', 'shape': [2, 8, 24], 'dtype': 'float16',
  }  # fmt: skip
  assert told['fields'][-1]['name'] == 'label'


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
    latent_index.Index.from_json(told)


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
