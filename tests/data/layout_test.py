import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import layout, picture_set, roles


def listing(names, folders=(), empty=()):
  found = layout.Listing()
  for name in names:
    found.files[name] = layout.File(0 if name in empty else 1, name, name)
    parts = name.split('/')[:-1]
    found.folders |= {'/'.join(parts[: i + 1]) for i in range(len(parts))}
  found.folders |= set(folders)
  return found


def arrange(names, folders=(), empty=()):
  return layout.arrange(
    listing(names, folders, empty),
    'PHOTOS',
    lambda files: [str(file.address) for file in files].__getitem__,
  )


def split(names, which='train', folders=()):
  return arrange(names, folders).splits[which]


def flowers(count, prefix=''):
  return [
    f'{prefix}{kind}/{i:03}.jpg' for kind in ('rose', 'aster')
    for i in range(count)
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'wanted'),
  [('._b.jpg', True), ('.cache', True), ('__MACOSX', True), ('@eaDir', True),
   ('.DS_Store', True), ('Thumbs.db', True), ('jpg', False), ('a b', False)],
)  # fmt: skip
def test_what_systems_leave_is_ignored(name, wanted):
  assert layout.is_ignored(name) == wanted


@pytest.mark.parametrize(
  ('name', 'wanted'),
  [('train', 'train'), ('Training', 'train'), ('train2017', 'train'),
   ('VAL', 'val'), ('validation', 'val'), ('eval', 'val'), ('dev', 'val'),
   ('val_2012', 'val'), ('test', 'test'), ('trains', ''), ('traineddata', ''),
   ('valley', ''), ('cat', ''), ('2017', '')],
)  # fmt: skip
def test_names_of_splits(name, wanted):
  assert roles.folder_role(name) == wanted


def test_hash_split_holds_out_a_tenth_and_loses_nothing():
  names = flowers(1000)
  found = arrange(names)
  train, val = (found.splits[name] for name in picture_set.SPLITS)
  assert sorted([*train.names, *val.names]) == sorted(names)
  assert 150 < len(val) < 250
  assert found.class_names == ('aster', 'rose')
  assert train.digest != val.digest
  assert 'one image in ten is held out' in found.origin
  assert [train.read(i) for i in range(3)] == list(train.names[:3])


def test_hash_split_of_a_path_ignores_its_company_and_top_folders():
  few, many = flowers(100), flowers(300)
  deep = [f'top/photos/{name}' for name in few]
  kept = set(split(many, 'val').names) & set(few)
  assert set(split(few, 'val').names) == kept
  nested = split(deep, 'val')
  assert set(nested.names) == kept
  assert {nested.path(i) for i in range(len(nested))} == {
    f'top/photos/{name}' for name in kept
  }
  assert nested.digest == split(few, 'val').digest


def test_labels_follow_sorted_classes_of_both_splits():
  names = ['train/cat/1.png', 'train/eel/1.png', 'val/bee/1.png',
           'val/eel/1.png']  # fmt: skip
  found = arrange(names)
  assert found.class_names == ('bee', 'cat', 'eel')
  assert found.splits['train'].labels.tolist() == [1, 2]
  assert found.splits['val'].labels.tolist() == [0, 2]


def test_order_is_by_class_even_where_names_share_a_start():
  found = arrange([f'train/{name}' for name in ('a/z.png', 'a-b/a.png')])
  assert found.class_names == ('a', 'a-b')
  assert found.splits['train'].labels.tolist() == [0, 1]


def test_flat_trees_have_no_classes():
  found = arrange([f'{i}.jpg' for i in range(100)])
  assert found.class_names == ()
  assert set(found.splits['train'].labels.tolist()) == {0}
  found = arrange(['train/1.jpg', 'train/2.jpg', 'val/3.jpg'])
  assert found.class_names == ()


def test_a_single_folder_is_the_only_class():
  names = [f'{i}.jpg' for i in range(100)]
  found = arrange([f'only/{name}' for name in names])
  assert found.class_names == ('only',)
  # Earlier versions took it for no class, and their runs continue.
  flat = arrange(names).splits['train']
  assert found.splits['train'].former == flat.former == flat.digest
  assert arrange(['train/a/1.png', 'val/a/2.png']).class_names == ('a',)


def test_a_lone_train_folder_is_split_and_test_does_not_count():
  names = flowers(200, 'train/')
  found = arrange(names)
  train, val = (found.splits[name] for name in picture_set.SPLITS)
  assert sorted([*train.names, *val.names]) == sorted(flowers(200))
  assert len(val)
  more = arrange([*names, 'test/rose/1.jpg'])
  assert more.splits['train'].digest == train.digest
  assert '1 images in test/ are left out' in more.notes


@pytest.mark.parametrize(
  ('train', 'val'),
  [('Train', 'Val'), ('training', 'validation'), ('train', 'eval'),
   ('train2017', 'val2017'), ('TRAIN', 'dev'), ('train', 'valid')],
)  # fmt: skip
def test_other_names_of_splits(train, val):
  names = [*flowers(3, f'{train}/'), *flowers(2, f'{val}/')]
  found = arrange(names)
  assert found.class_names == ('aster', 'rose')
  assert [len(found.splits[name]) for name in ('train', 'val')] == [6, 4]
  assert found.origin == f'{train}/ and {val}/ are the splits'
  plain = arrange([*flowers(3, 'train/'), *flowers(2, 'val/')])
  assert found.splits['val'].digest == plain.splits['val'].digest


def test_beside_splits_nothing_is_a_class():
  names = [*flowers(3, 'train/'), *flowers(2, 'val/'), *flowers(4, 'raw/')]
  found = arrange([*names, 'logo.png', 'test/rose/1.jpg', 'valid/x.png'])
  assert found.class_names == ('aster', 'rose')
  assert len(found.splits['train']) == 6
  assert found.notes == (
    '1 images beside the splits are left out',
    '8 images in raw/ are left out',
    '1 images in test/ are left out',
    '1 images in valid/ are left out',
  )
  found = arrange([*flowers(50, 'train/'), *flowers(4, 'raw/')])
  assert found.class_names == ('aster', 'rose')
  assert '8 images in raw/ are left out' in found.notes


def test_a_class_may_be_called_train():
  names = [*flowers(50), *(f'train/{i}.png' for i in range(50))]
  found = arrange(names)
  assert found.class_names == ('aster', 'rose', 'train')
  assert len(found.splits['train']) > 100
  assert any('taken for a class' in note for note in found.notes)


def test_an_empty_class_keeps_its_label():
  names = ['a/1.png', 'c/1.png', 'c/2.png', 'notes/readme.txt']
  found = arrange(names, folders=['b', 'b/deep'])
  assert found.class_names == ('a', 'b', 'c')
  assert 'b/ holds no files and keeps its label as a class' in found.notes
  assert 'notes/: no images inside, so no class' in found.notes
  # So does one whose only picture is damaged.
  found = arrange(names, empty=['a/1.png'])
  assert found.class_names == ('a', 'c')
  assert found.splits['train'].labels.tolist() == [1, 1]


def test_numbers_are_sorted_as_numbers():
  found = arrange([f'{i}/{j}.png' for i in range(12) for j in range(9)])
  assert found.class_names == tuple(str(i) for i in range(12))
  assert 'label 2 is 2, not 10' in ' '.join(found.notes)
  train = found.splits['train']
  for name, label in zip(train.names, train.labels, strict=True):
    assert name.split('/')[0] == str(label)
  padded = arrange([f'{i:02}/{j}.png' for i in range(12) for j in range(9)])
  assert not padded.notes


def test_synsets_are_compared_with_imagenets():
  found = arrange([f'{s}/{i}.png' for s in ('n01443537', 'n01440764')
                   for i in range(5)])  # fmt: skip
  assert found.class_names == ('n01440764', 'n01443537')
  assert "2 of ImageNet's 1,000 synsets" in found.notes[0]


def test_files_that_are_no_pictures_are_counted():
  found = arrange(['a/1.jpg', 'a/2.HEIF2', 'a/3.txt', 'b/4.txt', 'README'])
  assert found.skipped == {'.heif2': 1, '.txt': 2, 'no suffix': 1}
  assert found.describe()[2] == 'skipped: 1 .heif2, 2 .txt, 1 no suffix'


def test_empty_files_are_bad():
  found = arrange(['a/1.jpg', 'a/2.jpg', 'b/3.jpg'], empty=['a/2.jpg'])
  assert found.bad == (picture_set.Bad('a/2.jpg', 'the file is empty'),)
  assert '1 unreadable (such as a/2.jpg: the file is empty)' in str(
    found.describe()
  )
  assert sum(len(part) for part in found.splits.values()) == 2


def test_pictures_in_both_splits_are_noted():
  found = listing(['train/a/1.png', 'train/a/2.png', 'val/a/1.png'])
  found.files['val/a/1.png'] = found.files['train/a/1.png']
  notes = layout.arrange(found, 'PHOTOS', lambda files: len).notes
  assert '1 of the 1 val images are the same files' in notes[0]


def test_digest_sees_names_sizes_and_classes():
  digests = set()
  for change in ({}, {'rose/000.jpg': 2, 'rose/001.jpg': 2}, {'tulip/0.jpg': 1},
                 {'tulip/1.jpg': 1}):  # fmt: skip
    found = listing(flowers(20))
    for name, size in change.items():
      found.files[name] = layout.File(size, name)
    made = layout.arrange(found, '', lambda files: len)
    digests.add(made.splits['train'].digest)
  assert len(digests) == 4


def test_three_lines_describe_a_set():
  names = [*flowers(3, 'train/'), 'val/rose/1.jpg']
  assert arrange(names).describe() == (
    'data: 6 train, 1 val images, 2 classes, 1 of them without val images '
    '(PHOTOS)',
    'split: train/ and val/ are the splits',
    'skipped: nothing',
  )


@pytest.mark.parametrize(
  ('names', 'folders', 'message'),
  [
    ([], (), 'PHOTOS holds no images; wanted'),
    (['a.heic', 'b.txt'], (), 'it has 1 .heic, 1 .txt.*pillow-heif'),
    (['a/1.png', 'b/1.png', 'logo.png'], (), 'such as logo.png'),
    (['train/a/1.png', 'val/1.png'], (), 'launch.prepare.*--labels'),
    (['Train/1.png', 'training/1.png'], (), 'Train/ and training/'),
    (['train/1.png', 'valid/1.png', 'dev/1.png'], (), 'dev/ and valid/'),
    (['test/a/1.png', 'a/1.png'], (), 'test/ beside a/'),
    (['eval/1.png', 'a/1.png', 'b/1.png'], (), 'eval/ beside a/'),
    (['test/a/1.png', 'test/b/1.png'], (), 'test/ without train/'),
    (['val/a/1.png'], (), 'val/ without train/'),
    (['train/1.png', 'a/1.png', 'test/1.png'], (), 'test/ beside a/'),
  ],
)
def test_unusable_trees_are_named(names, folders, message, monkeypatch):
  monkeypatch.setattr(
    layout.pictures, 'suffixes', lambda: frozenset({'.png', '.jpg'})
  )
  with pytest.raises(errors.DataError, match=message) as caught:
    arrange(names, folders)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('train', 'val'),
  [('train_images', 'val_images'), ('my-train-set', 'my-validation-set'),
   ('ILSVRC2012_img_train', 'ILSVRC2012_img_val')],
)  # fmt: skip
def test_folders_that_all_tell_their_split_in_words(train, val):
  found = arrange([*flowers(3, f'{train}/'), *flowers(2, f'{val}/')])
  assert found.class_names == ('aster', 'rose')
  assert [len(found.splits[name]) for name in ('train', 'val')] == [6, 4]
  # One that tells none may be a class beside them.
  found = arrange([*flowers(9, f'{train}/'), 'other/1.png'])
  assert set(found.class_names) == {train, 'other'}


def test_train_and_test_sets_are_splits():
  found = arrange([*flowers(50, 'training_set/'), *flowers(9, 'test_set/')])
  assert found.class_names == ('aster', 'rose')
  assert '18 images in test_set/ are left out' in found.notes


def test_a_class_with_empty_siblings_keeps_its_label():
  found = arrange(['b/1.png', 'b/2.png'], folders=['a'])
  assert found.class_names == ('a', 'b')
  found = arrange(['data/b/1.png', 'data/b/2.png'], folders=['data/a'])
  assert found.class_names == ('a', 'b')
  # Beside a folder of class folders an empty one is nothing.
  found = arrange(['data/b/1.png', 'data/c/2.png'], folders=['logs'])
  assert found.class_names == ('b', 'c')


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (['cat/train/1.png', 'cat/val/1.png', 'dog/train/1.png'], 'as cat/train'),
    (['nut/train/good/1.png', 'nut/test/bad/1.png', 'x/train/good/1.png'],
     'as nut/train'),
    (['train/n1/images/1.png', 'train/n2/images/1.png', 'val/images/1.png'],
     'launch.prepare .*--labels'),
  ],
)  # fmt: skip
def test_splits_and_classes_that_are_mixed_up_are_named(names, message):
  with pytest.raises(errors.DataError, match=message):
    arrange(names)


def test_a_missing_split_is_noted():
  found = arrange(['train/a/1.png'], folders=['val'])
  assert 'there are no val images, which every training needs' in found.notes


def test_links_in_every_order_end(monkeypatch):
  monkeypatch.setattr(layout, 'MOST_FOLDERS', 2)
  found = layout.Listing()
  layout.add_folder(found, 'a')
  layout.add_folder(found, 'b')
  with pytest.raises(errors.DataError, match='links lead from folder to'):
    layout.add_folder(found, 'c')
