import pickle
import sys

import numpy as np
import pyarrow as pa
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import parquet, picture_set
from tests.data import forms, trees


def columns(count, start=0, **others):
  images = [
    {'bytes': trees.png(i), 'path': f'{i}.png'}
    for i in range(start, start + count)
  ]
  return {'image': images} | others


def write(path, count=20, start=0, hub=None, **others):
  return forms.write_parquet(path, columns(count, start, **others), hub)


def read(path, **options):
  return parquet.open_parquet(str(path), **options)


def refusal(path, **options):
  with pytest.raises(errors.DataError) as caught:
    read(path, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def counts(found):
  return {split: len(found.splits[split]) for split in picture_set.SPLITS}


# Paths and splits.


@pytest.mark.parametrize(
  ('files', 'given'),
  [
    (('data/train-00000-of-00001', 'data/validation-00000-of-00001'), '.'),
    (('train/0000', 'validation/0000', 'test/0000'), '.'),
    (('default/train/0000', 'default/val/0000'), '.'),
    (('a/train/0000', 'a/test/0000', 'b/train/0000'), 'a'),
    (('train', 'test'), '.'),
  ],
)
def test_files_and_folders_name_splits(tmp_path, files, given):
  for number, name in enumerate(files):
    write(tmp_path / f'{name}.parquet', 4 + number)
  assert parquet.matches(str(tmp_path))
  found = read(tmp_path / given)
  assert counts(found) == {'train': 4, 'val': 5}


def test_a_file_is_a_data_set(tmp_path):
  path = write(tmp_path / 'x.parquet', 100)
  assert parquet.matches(str(path))
  found = read(path)
  assert sum(counts(found).values()) == 100
  assert 2 < counts(found)['val'] < 25
  assert 'one image in ten is held out' in found.origin


def test_the_home_folder_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path / 'x.parquet')
  assert parquet.matches('~/x.parquet')
  assert sum(counts(read('~/x.parquet')).values()) == 20


def test_other_paths_do_not_match(tmp_path):
  trees.write(tmp_path / 'tree', 'cat/0.png', 'eel/0.png')
  (tmp_path / '.cache').mkdir()
  (tmp_path / '.cache' / 'x.parquet').write_bytes(b'')
  for path in (tmp_path, tmp_path / 'tree', tmp_path / 'none.parquet'):
    assert not parquet.matches(str(path))


def test_configurations_are_told_apart(tmp_path):
  for name in ('small', 'large'):
    write(tmp_path / name / 'train' / '0000.parquet')
  assert 'has 2 configurations (large, small)' in refusal(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
  write(tmp_path / 'data' / 'train-00001-of-00002.parquet')
  assert 'lacks data/train-00000-of-00002.parquet' in refusal(tmp_path)
  path = write(tmp_path / 'data' / 'train-00000-of-00002.parquet')
  path.write_bytes(path.read_bytes()[:-100])
  assert str(path) in refusal(tmp_path)
  path.write_bytes(b'')
  assert str(path) in refusal(tmp_path)
  assert 'no Parquet files' in refusal(tmp_path / 'none')


def test_a_damaged_page_is_named_with_its_file(tmp_path):
  path = write(tmp_path / 'train.parquet', label=[0] * 20)
  data = bytearray(path.read_bytes())
  # The header of the first page.
  data[4:24] = b'\xff' * 20
  path.write_bytes(data)
  assert str(path) in refusal(path)


def test_columns_must_agree(tmp_path):
  write(tmp_path / 'train-0.parquet', label=[0] * 20)
  write(tmp_path / 'train-1.parquet', label=['a'] * 20)
  assert 'train-1.parquet has the columns' in refusal(tmp_path)


# Columns.


def test_pictures_may_be_plain_bytes_of_any_name(tmp_path):
  images = [trees.png(i) for i in range(20)]
  path = forms.write_parquet(
    tmp_path / 'x.parquet', {'id': list(range(20)), 'scan': images}
  )
  found = read(path)
  split = found.splits['train']
  assert split.read(0) == images[int(split.names[0].split('/')[1])]


def test_the_column_of_several_that_is_called_image_is_read(tmp_path):
  images = [trees.png(i) for i in range(20)]
  path = write(tmp_path / 'x.parquet', mask=images)
  assert sum(counts(read(path)).values()) == 20
  path = forms.write_parquet(
    tmp_path / 'y.parquet', {'one': images, 'two': images}
  )
  message = refusal(path)
  assert 'one (binary), two (binary)' in message
  path = forms.write_parquet(tmp_path / 'z.parquet', {'url': ['http://x']})
  assert 'no column of images, among url (string)' in refusal(path)


def test_pictures_that_are_only_paths_are_refused(tmp_path):
  images = [{'bytes': None, 'path': f'{i}.png'} for i in range(20)]
  path = forms.write_parquet(tmp_path / 'x.parquet', {'image': images})
  assert 'embed_external_files' in refusal(path)


def test_empty_pictures_are_bad(tmp_path):
  images = columns(20)['image']
  images[3] = {'bytes': b'', 'path': 'x.png'}
  found = read(forms.write_parquet(tmp_path / 'x.parquet', {'image': images}))
  assert [bad.path for bad in found.bad] == ['x.parquet/3']
  assert sum(counts(found).values()) == 19


# Labels.


def labels(found):
  return {
    int(found.splits[split].names[i].rpartition('/')[2]): label
    for split in picture_set.SPLITS
    for i, label in enumerate(found.splits[split].labels.tolist())
  }


def feature(**features):
  return {'info': {'features': features}}


@pytest.mark.parametrize('name', ['label', 'labels', 'fine_label', 'breed'])
def test_numbers_have_the_names_of_the_schema(tmp_path, name):
  hub = feature(
    **{
      name: {'_type': 'ClassLabel', 'names': ['zebra', 'ape', 'cat']},
      'image': {'_type': 'Image'},
    }
  )
  path = write(
    tmp_path / 'x.parquet', hub=hub, **{name: [i % 3 for i in range(20)]}
  )
  found = read(path)
  assert found.class_names == ('zebra', 'ape', 'cat')
  assert labels(found) == {i: i % 3 for i in range(20)}


def test_fine_labels_go_before_coarse_ones_and_a_note_says_so(tmp_path):
  hub = feature(
    coarse_label={'_type': 'ClassLabel', 'names': ['a']},
    fine_label={'_type': 'ClassLabel', 'names': ['b', 'c']},
  )
  path = write(
    tmp_path / 'x.parquet', hub=hub, coarse_label=[0] * 20, fine_label=[1] * 20
  )
  found = read(path)
  assert found.class_names == ('b', 'c')
  assert any('not of coarse_label' in note for note in found.notes)


def test_texts_are_sorted(tmp_path):
  for dictionary in (False, True):
    texts = pa.array(['rose', 'aster'] * 10)
    found = read(
      write(
        tmp_path / f'{dictionary}.parquet',
        label=texts.dictionary_encode() if dictionary else texts,
      )
    )
    assert found.class_names == ('aster', 'rose')
    assert labels(found)[0] == 1


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_row_without_a_picture_is_bad(tmp_path, monkeypatch, in_memory):
  if not in_memory:
    monkeypatch.setattr(parquet, 'MOST_BYTES', 0)
  images = columns(20)['image']
  images[3] = None
  images[5] = {'bytes': None, 'path': '5.png'}
  path = forms.write_parquet(tmp_path / 'train.parquet', {'image': images})
  found = read(path, any_size=True)
  listed = [bad.path for bad in found.bad]
  for split in found.splits.values():
    for i, name in enumerate(split.names):
      data = split.read(i)
      assert data or not in_memory
      if not data:
        listed.append(name)
  assert listed == ['train.parquet/3', 'train.parquet/5']


def test_numbers_without_names_are_labels(tmp_path):
  found = read(write(tmp_path / 'x.parquet', label=[2, 0] * 10))
  assert found.class_names == ('0', '1', '2')
  assert labels(found)[0] == 2


def test_without_labels_there_are_no_classes(tmp_path):
  found = read(write(tmp_path / 'x.parquet', text=['a flower'] * 20))
  assert found.class_names == ()
  assert any('none of image, text' in note for note in found.notes)


@pytest.mark.parametrize(
  ('values', 'hub', 'message'),
  [
    ([0, -1] * 10, None, r'x\.parquet/1 is of class -1'),
    (
      [0, 1] * 10,
      feature(label={'_type': 'ClassLabel', 'names': ['a']}),
      r'x\.parquet/1 is of class 1',
    ),
    ([0, None] * 10, None, r'x\.parquet/1 has no label, as have 10 of 20'),
    ([[0], [1]] * 10, None, r'the column label is of list<'),
    ([0.5] * 20, None, r'the column label is of double'),
  ],
)
def test_what_cannot_be_a_label_is_named(tmp_path, values, hub, message):
  path = write(tmp_path / 'x.parquet', hub=hub, label=values)
  with pytest.raises(errors.DataError, match=message):
    read(path)


def test_labels_of_what_is_left_out_do_not_matter(tmp_path):
  write(tmp_path / 'train.parquet', label=[0] * 20)
  write(tmp_path / 'validation.parquet', label=[0] * 20)
  # As ImageNet on the hub.
  write(tmp_path / 'test.parquet', label=[-1] * 20)
  assert counts(read(tmp_path)) == {'train': 20, 'val': 20}


# Sets that are too large to be kept in memory.


@pytest.fixture(name='large')
def _large(tmp_path, monkeypatch):
  forms.write_hub(tmp_path / 'set')
  monkeypatch.setattr(parquet, 'MOST_BYTES', 1000)
  return tmp_path / 'set'


def test_a_large_set_is_refused_with_the_command(large):
  message = refusal(large)
  assert f'python -m launch.prepare --path={large} --out=' in message


def test_a_large_set_is_read_in_order_a_group_at_a_time(large, monkeypatch):
  read_groups = []
  original = parquet._Groups._read
  monkeypatch.setattr(
    parquet._Groups,
    '_read',
    lambda self, number: read_groups.append(number) or original(self, number),
  )
  found = read(large, any_size=True)
  assert not read_groups
  split = pickle.loads(pickle.dumps(found.splits['train']))
  wanted = forms.of_split('train')
  assert [split.read(i) for i in range(45)] == [p.data for p in wanted]
  # 17 and 28 rows, eight at a time.
  assert read_groups == list(range(7))
  assert split.labels.tolist() == [p.label for p in wanted]
  assert not split.sizes.any()
  assert [split.read(i) for i in (40, 3, 20)] == [
    wanted[i].data for i in (40, 3, 20)
  ]


def test_fingerprints_of_large_sets_see_files_and_labels(tmp_path, large):
  before = read(large, any_size=True)
  assert read(large, any_size=True).fingerprint == before.fingerprint
  assert before.splits['train'].fingerprint != before.splits['val'].fingerprint
  path = large / 'data' / 'validation-00000-of-00001.parquet'
  chosen = forms.of_split('val')
  forms.write_parquet(path, forms.hub_columns(chosen[::-1]), forms.HUB)
  assert read(large, any_size=True).fingerprint != before.fingerprint


def test_pictures_are_read_once_in_a_process(tmp_path, monkeypatch):
  found = read(write(tmp_path / 'x.parquet'))
  split = found.splits['train']
  copy = pickle.loads(pickle.dumps(split))
  reads = []
  original = parquet._read_table
  monkeypatch.setattr(
    parquet,
    '_read_table',
    lambda *args: reads.append(args) or original(*args),
  )
  for each in (split, copy):
    for index in range(len(each)):
      number = int(each.names[index].split('/')[1])
      assert each.read(index) == trees.png(number)
  assert len(reads) == 1
  np.testing.assert_array_equal(
    split.sizes, [len(split.read(i)) for i in range(len(split))]
  )


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
  path = write(tmp_path / 'x.parquet')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  assert "pip install 'selfboottok_jax[parquet]'" in refusal(path)
