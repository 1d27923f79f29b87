import pickle

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import joined, picture_set, pictures
from tests.data import trees


@pytest.fixture
def found(tmp_path):
  root = trees.write(tmp_path / 'tree', *trees.NAMES)
  return joined.open_trees([str(root)])


def test_the_fingerprint_sees_the_bytes(found, tmp_path):
  before = found.splits['train'].fingerprint
  file = tmp_path / 'tree' / 'train' / 'cat' / '1.png'
  data = bytearray(file.read_bytes())
  data[-20] ^= 1
  file.write_bytes(data)
  again = joined.open_trees([str(tmp_path / 'tree')])
  assert again.splits['train'].digest == found.splits['train'].digest
  assert again.splits['train'].fingerprint != before
  assert again.splits['val'].fingerprint == found.splits['val'].fingerprint
  assert again.fingerprint != found.fingerprint


@pytest.mark.parametrize('count', [0, 1, 63, 64, 1000])
def test_hashed_pictures_are_spread(count):
  indices = picture_set.hashed_indices(count)
  assert len(set(indices)) == min(count, picture_set.HASHED)
  assert all(0 <= i < count for i in indices)
  if count:
    assert max(indices) >= count * 0.98 - 1


def test_a_source_knows_its_other_split(found):
  source = picture_set.PictureSource(found, 'train')
  assert source.class_names == ('bee', 'cat')
  assert len(source) == 6
  val = source.of_split('val')
  assert 'val' in repr(val)
  assert val.fingerprint == found.splits['val'].fingerprint
  copy = pickle.loads(pickle.dumps(source))
  assert copy.picture_set is None
  np.testing.assert_array_equal(copy[3]['image'], source[3]['image'])


def test_orientation_is_part_of_the_fingerprint(found):
  upright = picture_set.PictureSource(found, 'train')
  stored = picture_set.PictureSource(
    found, 'train', pictures.Options(exif=False)
  )
  assert upright.fingerprint != stored.fingerprint
  # Runs of earlier versions read pictures as they are stored.
  assert upright.former_fingerprint == ''
  assert stored.former_fingerprint == found.splits['train'].digest


def test_bad_pictures_are_named_when_they_are_read(found, tmp_path):
  (tmp_path / 'tree' / 'train' / 'bee' / '1.png').write_bytes(b'<html>')
  source = picture_set.PictureSource(found, 'train')
  source[0]
  with pytest.raises(errors.DataError, match='train/bee/1.png is no image'):
    source[1]


def test_an_empty_split_is_refused(tmp_path):
  root = trees.write(tmp_path / 'tree', 'train/a/1.png')
  (root / 'val').mkdir()
  found = joined.open_trees([str(root)])
  with pytest.raises(errors.DataError, match='val split of .* is empty'):
    picture_set.PictureSource(found, 'val')


def test_classes_are_counted(found):
  assert found.count_classes('train') == {'bee': 3, 'cat': 3}
