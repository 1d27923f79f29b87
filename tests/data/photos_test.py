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


def arrange(names, split='train', folders=()):
  sizes = dict.fromkeys(names, 1)
  return photos.arrange(sizes, folders, split, 'PHOTOS')


def flowers(count, prefix=''):
  return [
    f'{prefix}{kind}/{i:03}.jpg' for kind in ('rose', 'aster')
    for i in range(count)
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('path', 'wanted'),
  [
    ('a/b.JPG', True),
    ('b.webp', True),
    ('a/CLASSES.tsv', False),
    ('a/._b.jpg', False),
    ('.cache/b.jpg', False),
    ('__MACOSX/a/b.jpg', False),
    ('a/.DS_Store', False),
    ('jpg', False),
  ],
)
def test_only_visible_image_suffixes_count(path, wanted):
  assert photos.is_image(path) == wanted


def test_hash_split_holds_out_a_tenth_and_loses_nothing():
  names = flowers(1000)
  train, val = arrange(names), arrange(names, 'val')
  assert sorted(train.files + val.files) == sorted(names)
  assert 150 < len(val.files) < 250
  assert train.class_names == val.class_names == ('aster', 'rose')
  assert train.fingerprint != val.fingerprint


def test_hash_split_of_a_path_ignores_its_company_and_top_folders():
  few, many = flowers(100), flowers(300)
  deep = [f'top/photos/{name}' for name in few]
  kept = set(arrange(many, 'val').files) & set(few)
  assert set(arrange(few, 'val').files) == kept
  nested = arrange(deep, 'val')
  assert {name.removeprefix('top/photos/') for name in nested.files} == kept
  assert nested.fingerprint == arrange(few, 'val').fingerprint


def test_labels_follow_sorted_classes_of_both_splits():
  names = ['train/cat/1.png', 'train/eel/1.png', 'val/bee/1.png',
           'val/eel/1.png']  # fmt: skip
  train, val = arrange(names), arrange(names, 'val')
  assert train.class_names == val.class_names == ('bee', 'cat', 'eel')
  assert train.labels == (1, 2)
  assert val.labels == (0, 2)


def test_order_is_by_class_even_where_names_share_a_start():
  train = arrange([f'train/{name}' for name in ('a/z.png', 'a-b/a.png')])
  assert train.class_names == ('a', 'a-b')
  assert train.labels == (0, 1)


def test_flat_trees_have_no_classes():
  names = [f'{i}.jpg' for i in range(100)]
  train = arrange(names)
  assert train.class_names == ()
  assert set(train.labels) == {0}
  assert arrange([f'only/{n}' for n in names]).fingerprint == train.fingerprint


def test_a_lone_train_folder_is_split_and_other_folders_do_not_count():
  names = flowers(200, 'train/')
  train, val = arrange(names), arrange(names, 'val')
  assert sorted(train.files + val.files) == sorted(names)
  assert val.files
  more = arrange([*names, 'test/rose/1.jpg'])
  assert more == train


def test_a_class_may_be_called_train():
  names = [*flowers(50), *(f'train/{i}.png' for i in range(50))]
  train = arrange(names)
  assert train.class_names == ('aster', 'rose', 'train')
  assert len(train.files) > 100


def test_fingerprint_sees_names_sizes_and_classes():
  sizes = dict.fromkeys(flowers(20), 1)
  prints = set()
  for change in ({}, {'rose/000.jpg': 2, 'rose/001.jpg': 2}, {'tulip/0.jpg': 1},
                 {'tulip/1.jpg': 1}):  # fmt: skip
    prints.add(photos.arrange(sizes | change, (), 'train', '').fingerprint)
  assert len(prints) == 4


@pytest.mark.parametrize(
  ('names', 'split', 'folders', 'message'),
  [
    ([], 'train', (), 'PHOTOS holds no images'),
    (
      ['train/a/1.png'],
      'val',
      ('train', 'val'),
      'val split of PHOTOS is empty',
    ),
    (['x/train/a/1.png'], 'val', ('x/val',), 'val split of PHOTOS is empty'),
    (['val/a/1.png'], 'train', (), 'train split of PHOTOS is empty'),
    (['train/1.png', 'valid/1.png'], 'val', (), 'rename valid/ to val/'),
    (['a/1.png', 'b/1.png', 'logo.png'], 'train', (), 'such as logo.png'),
  ],
)
def test_unusable_trees_are_named(names, split, folders, message):
  with pytest.raises(errors.DataError, match=message) as caught:
    arrange(names, split, folders)
  assert '\n' not in str(caught.value)


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
