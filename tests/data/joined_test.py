import pickle

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import joined, picture_set
from tests.data import trees


@pytest.fixture
def parts(tmp_path):
  """A folder of train, a tar of val without classes, and its labels."""
  train = trees.write(
    tmp_path / 'my_train_photos', *(f'{k}/{i}.png' for k in 'ab' for i in '012')
  )
  val = trees.write(tmp_path / 'val', *(f'{i}.png' for i in range(4)))
  (tmp_path / 'labels.txt').write_text('b\na\nb\nb\n')
  return str(train), str(trees.pack(val, tmp_path / 'val.tar', 'photos'))


def test_two_paths_are_two_splits(parts, tmp_path):
  found = joined.open_trees(parts, [str(tmp_path / 'labels.txt')])
  assert found.class_names == ('a', 'b')
  assert found.splits['val'].labels.tolist() == [0, 1, 1, 1]
  source = picture_set.PictureSource(found, 'val')
  for reader in (source, pickle.loads(pickle.dumps(source))):
    for index, seed in enumerate((1, 0, 2, 3)):
      np.testing.assert_array_equal(
        reader[index]['image'], np.asarray(trees.picture(seed))
      )
  assert 'val/a/1.png' in source.name(0)
  # Equal offsets and names in two places are not the same files.
  assert not any('same files' in note for note in found.notes)


def test_without_labels_the_way_to_give_them_is_named(parts):
  with pytest.raises(errors.DataError, match='--labels=FILE'):
    joined.open_trees(parts)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (('photos', 'val'), 'photos does not tell train from val'),
    (('train_a', 'train_b'), 'are of train, train'),
    (('train_val', 'val'), 'train_val does not tell'),
    (('train', 'test'), 'test does not tell'),
  ],
)
def test_names_that_tell_no_split(tmp_path, names, message):
  paths = [str(trees.write(tmp_path / name, 'a/1.png')) for name in names]
  with pytest.raises(errors.DataError, match=message):
    joined.open_trees(paths)
