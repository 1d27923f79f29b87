import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import layout


def arrange(names, split='train', folders=()):
  sizes = dict.fromkeys(names, 1)
  return layout.arrange(sizes, folders, split, 'PHOTOS')


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
  assert layout.is_image(path) == wanted


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
    prints.add(layout.arrange(sizes | change, (), 'train', '').fingerprint)
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
