import os

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import folders, joined, picture_set
from tests.data import trees


@pytest.fixture
def folder(tmp_path):
  return trees.write(tmp_path / 'tree', *trees.NAMES)


def open_folder(path, split='train'):
  return picture_set.PictureSource(joined.open_trees([str(path)]), split)


def test_images_are_those_of_their_files(folder):
  source = open_folder(folder, 'val')
  # val/bee/0.png is the tenth name.
  image = source[0]['image']
  np.testing.assert_array_equal(image, np.asarray(trees.picture(9)))
  assert image.shape == (10, 12, 3)
  assert image.dtype == np.uint8


def test_a_file_that_vanished_is_named(folder):
  source = open_folder(folder)
  (folder / 'train' / 'bee' / '0.png').unlink()
  with pytest.raises(errors.DataError, match='cannot read .*train/bee/0.png'):
    source[0]


def test_a_folder_linked_to_its_parent_shows_each_picture_once(folder):
  before = len(open_folder(folder))
  (folder / 'train' / 'cat' / 'again').symlink_to(folder / 'train')
  assert len(open_folder(folder)) == before == 6


def test_linked_folders_are_followed_as_given(tmp_path):
  trees.write(tmp_path / 'raw', 'a/0.png', 'a/1.png', 'b/0.png')
  root = tmp_path / 'photos'
  for split in picture_set.SPLITS:
    (root / split).mkdir(parents=True)
    for kind in 'ab':
      (root / split / kind).symlink_to(tmp_path / 'raw' / kind)
  found = joined.open_trees([str(root)])
  assert [len(part) for part in found.splits.values()] == [3, 3]
  assert found.class_names == ('a', 'b')
  assert '3 of the 3 val images are the same files' in found.notes[0]
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'train').symlink_to(tmp_path / 'raw')
  (tmp_path / 'other' / 'val').symlink_to('train')
  found = joined.open_trees([str(tmp_path / 'other')])
  assert [len(part) for part in found.splits.values()] == [3, 3]


def test_what_cannot_be_a_picture_is_bad(folder):
  (folder / 'train' / 'bee' / 'gone.png').symlink_to('nowhere.png')
  os.mkfifo(folder / 'train' / 'bee' / 'pipe.png')
  found = joined.open_trees([str(folder)])
  assert [(item.path, item.reason) for item in found.bad] == [
    (
      'train/bee/gone.png',
      'it is a link to nowhere.png, which is not there',
    ),
    ('train/bee/pipe.png', 'it is no regular file'),
  ]
  assert len(found.splits['train']) == 6


def test_a_folder_that_cannot_be_listed_is_named(folder):
  if not os.getuid():
    pytest.skip('root lists everything')
  (folder / 'train').chmod(0)
  with pytest.raises(errors.DataError, match='cannot list .*train'):
    folders.list_folder(str(folder))


def test_names_need_not_be_text(tmp_path):
  root = tmp_path / 'tree'
  data = trees.png(0)
  (root / 'a').mkdir(parents=True)
  for i in range(40):
    name = os.fsencode(root / 'a') + b'/\xff%d.png' % i
    with open(name, 'wb') as file:
      file.write(data)
  source = open_folder(root)
  assert source[0]['image'].shape == (10, 12, 3)
  assert len(source.fingerprint) == 64
