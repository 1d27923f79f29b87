import concurrent.futures
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import photos
from tests.data import trees


def _open(path, split):
  opener = photos.open_folder if path.is_dir() else photos.open_tar
  return opener(str(path), split)


NAMES = [
  f'{split}/{kind}/{i}.png'
  for split in ('train', 'val')
  for kind in ('cat', 'bee')
  for i in range(3)
]


@pytest.fixture
def folder(tmp_path):
  root = trees.write(tmp_path / 'tree', *NAMES)
  (root / 'CLASSES.tsv').write_text('0\tcat\n')
  (root / 'train' / 'cat' / '._0.png').write_bytes(b'resource fork')
  (root / '.DS_Store').write_bytes(b'')
  return root


def test_images_are_those_of_their_files(folder):
  source = _open(folder, 'val')
  # val/bee/0.png is the tenth name.
  image = source[0]['image']
  np.testing.assert_array_equal(image, np.asarray(trees.picture(9)))
  assert image.shape == (10, 12, 3)
  assert image.dtype == np.uint8


def test_tars_are_read_from_many_threads_and_copies(folder, tmp_path):
  tar = trees.pack(folder, tmp_path / 'photos.tar')
  source = _open(tar, 'train')
  copy = pickle.loads(pickle.dumps(source))
  wanted = [source[i]['image'] for i in range(6)]
  order = list(range(6)) * 20
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for reader in (source, copy):
      images = list(pool.map(lambda i, r=reader: r[i]['image'], order))
      for i, image in zip(order, images, strict=True):
        np.testing.assert_array_equal(image, wanted[i])


def test_sources_close_their_files(folder, tmp_path):
  tar = trees.pack(folder, tmp_path / 'photos.tar')
  before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc') else 0
  for _ in range(5):
    _open(tar, 'train')
  after = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc') else 0
  assert after == before


def test_hard_links_in_a_tar_are_images(tmp_path):
  tar = tmp_path / 'links.tar'
  with tarfile.open(tar, 'w') as file:
    data = trees.png(0)
    member = tarfile.TarInfo('train/1.png')
    member.size = len(data)
    file.addfile(member, io.BytesIO(data))
    link = tarfile.TarInfo('val/1.png')
    link.type, link.linkname = tarfile.LNKTYPE, 'train/1.png'
    file.addfile(link)
  source = _open(tar, 'val')
  np.testing.assert_array_equal(
    source[0]['image'], np.asarray(trees.picture(0))
  )


@pytest.mark.parametrize('tar', [False, True])
@pytest.mark.parametrize('damage', ['text', 'empty', 'truncated'])
def test_damaged_images_are_named_when_read(folder, tmp_path, damage, tar):
  file = folder / 'train' / 'bee' / '1.png'
  good = file.read_bytes()
  data = {'text': b'<html>', 'empty': b'', 'truncated': good[:100]}[damage]
  file.write_bytes(data)
  path = trees.pack(folder, tmp_path / 'photos.tar') if tar else folder
  source = _open(path, 'train')
  source[0]
  with pytest.raises(errors.DataError, match='train/bee/1.png is no image'):
    source[1]


def test_a_file_that_vanished_is_named(folder):
  source = _open(folder, 'train')
  (folder / 'train' / 'bee' / '0.png').unlink()
  with pytest.raises(errors.DataError, match='cannot read .*train/bee/0.png'):
    source[0]


def test_a_folder_linked_to_its_parent_shows_each_picture_once(folder):
  before = len(_open(folder, 'train'))
  (folder / 'train' / 'cat' / 'again').symlink_to(folder / 'train')
  assert len(_open(folder, 'train')) == before == 6
