import json
import pickle
import shutil

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import joined, picture_set, prepare, records
from tests.data import trees


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A folder, and the data set that was prepared of it in shards of 5."""
  root = tmp_path_factory.mktemp('records')
  names = [f'{s}/{k}/{i}.png' for s, n in (('train', 6), ('val', 2))
           for k in ('cat', 'bee', 'a\\b\nc') for i in range(n)]  # fmt: skip
  folder = trees.write(root / 'photos', *names)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare, 'SHARD_IMAGES', 5)
    found = joined.open_trees([str(folder)])
    prepare.prepare(found, str(root / 'out'), prepare.Settings())
  return folder, root / 'out'


@pytest.fixture
def copy(prepared, tmp_path):
  return shutil.copytree(prepared[1], tmp_path / 'copy')


def test_a_prepared_set_is_what_it_was_made_of(prepared):
  folder, out = prepared
  one = joined.open_trees([str(folder)])
  two = records.open_records(str(out))
  assert one.class_names == two.class_names == ('a\\b\nc', 'bee', 'cat')
  assert one.origin == two.origin
  assert one.fingerprint == two.fingerprint
  for split in picture_set.SPLITS:
    assert one.splits[split].fingerprint == two.splits[split].fingerprint
    assert one.splits[split].former == two.splits[split].former
    first, second = (picture_set.PictureSource(f, split) for f in (one, two))
    second = pickle.loads(pickle.dumps(second))
    assert len(first) == len(second)
    for i in range(len(first)):
      assert first[i]['label'] == second[i]['label']
      np.testing.assert_array_equal(first[i]['image'], second[i]['image'])
      assert first.name(i).removeprefix(str(folder)) == second.name(
        i
      ).removeprefix(str(out))


def test_a_flipped_byte_is_reported_with_its_shard(copy):
  shard = copy / 'train-00002-of-00004.array_record'
  data = bytearray(shard.read_bytes())
  # In the middle of the pictures, before the padding.
  data[600] ^= 4
  shard.write_bytes(data)
  source = picture_set.PictureSource(records.open_records(str(copy)), 'train')
  with pytest.raises(errors.DataError, match='train-00002-of-00004') as caught:
    [source[i] for i in range(len(source))]
  assert '\n' not in str(caught.value)


def _drop(index):
  del index['splits']['val']['shards']


def _version(index):
  index['version'] = 99


def _kind(index):
  index['kind'] = 'another'


@pytest.mark.parametrize(
  ('change', 'message'),
  [(_drop, 'is damaged'), (_version, 'version 99'), (_kind, "'another'")],
)
def test_an_index_that_does_not_fit_is_refused(copy, change, message):
  file = copy / records.INDEX
  index = json.loads(file.read_text())
  change(index)
  file.write_text(json.dumps(index))
  with pytest.raises(errors.DataError, match=message):
    records.open_records(str(copy))


@pytest.mark.parametrize(
  ('file', 'data', 'message'),
  [
    (records.INDEX, b'{', 'cannot be read'),
    (records.INDEX, b'[]', 'cannot be read'),
    ('train.tsv', b'0\t1\tx\n', 'train.tsv is damaged'),
    ('train.tsv', None, 'train.tsv cannot be read'),
    ('val-00000-of-00002.array_record', None, 'val-00000.* is missing'),
    ('val-00000-of-00002.array_record', b'short', 'has 5 bytes'),
  ],
)
def test_files_that_do_not_fit_are_named(copy, file, data, message):
  if data is None:
    (copy / file).unlink()
  else:
    (copy / file).write_bytes(data)
  with pytest.raises(errors.DataError, match=message) as caught:
    records.open_records(str(copy))
  assert '\n' not in str(caught.value)


def test_every_name_survives():
  names = ['a', 'a\tb', 'a\nb', 'a\\nb', '\\', '\\\\n', '', '\udcff', 'ä']
  rows = [(i, i * 7, name) for i, name in enumerate(names)]
  found, sizes, labels = records._read_rows(records.write_rows(rows))
  assert found == names
  assert sizes.tolist() == [i * 7 for i in range(len(names))]
  assert labels.tolist() == list(range(len(names)))
