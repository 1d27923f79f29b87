import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import picture_set, tfds
from tests.data import forms


@pytest.fixture(name='prepared', scope='module')
def _prepared(tmp_path_factory):
  """A folder of TFDS with the pictures, version 1.2.0."""
  root = tmp_path_factory.mktemp('tfds')
  forms.write_tfds(root)
  return root


@pytest.fixture(name='root', autouse=True)
def _root(prepared, tmp_path, monkeypatch):
  root = tmp_path / 'data'
  shutil.copytree(prepared / 'flowers', root / 'flowers')
  monkeypatch.setenv('TFDS_DATA_DIR', str(root))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return root


def refusal(path):
  with pytest.raises(errors.DataError) as caught:
    tfds.open_tfds(path)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def edit(root, change, name='dataset_info.json', version='1.2.0'):
  file = root / 'flowers' / version / name
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


@pytest.mark.parametrize(
  'path', ['flowers', 'flowers:1.2.0', 'flowers:1.*.*', 'flowers:*.*.*']
)
def test_names_are_found_below_the_data_folder(path):
  assert tfds.matches(f'tfds:{path}')
  found = tfds.open_tfds(f'tfds:{path}')
  assert len(found.splits['train']) == 45
  assert len(found.splits['val']) == 15
  assert 'val is validation' in found.origin


def test_only_the_prefix_matches(root):
  assert not tfds.matches(str(root / 'flowers' / '1.2.0'))


def test_folders_and_the_home_folder_are_found(root, monkeypatch, tmp_path):
  folder = root / 'flowers'
  for path in (folder, folder / '1.2.0'):
    assert len(tfds.open_tfds(f'tfds:{path}').splits['val']) == 15
  monkeypatch.setenv('HOME', str(tmp_path))
  assert len(tfds.open_tfds('tfds:~/data/flowers').splits['val']) == 15
  monkeypatch.delenv('TFDS_DATA_DIR')
  root.rename(tmp_path / 'tensorflow_datasets')
  assert len(tfds.open_tfds('tfds:flowers').splits['val']) == 15


def test_the_highest_version_is_taken(root):
  for version in ('1.10.0', '1.9.1'):
    shutil.copytree(root / 'flowers' / '1.2.0', root / 'flowers' / version)
  assert tfds._find('tfds:flowers').endswith('1.10.0')
  assert tfds._find('tfds:flowers:1.9.*').endswith('1.9.1')


def test_configurations_are_found(root):
  (root / 'two' / 'big').mkdir(parents=True)
  shutil.copytree(root / 'flowers' / '1.2.0', root / 'two' / 'big' / '1.2.0')
  assert tfds._find('tfds:two').endswith('two/big/1.2.0')
  shutil.copytree(root / 'two' / 'big', root / 'two' / 'small')
  assert tfds._find('tfds:two/small').endswith('two/small/1.2.0')
  assert tfds._find('tfds:two/small:1.2.0').endswith('two/small/1.2.0')
  assert 'configurations big, small' in refusal('tfds:two')
  assert 'configurations big, small' in refusal('tfds:two/tiny')
  (root / 'two' / '.config').mkdir()
  (root / 'two' / '.config' / 'metadata.json').write_text(
    '{"default_config_name": "small"}'
  )
  assert tfds._find('tfds:two').endswith('two/small/1.2.0')


@pytest.mark.parametrize(
  'path', ['none', 'none/config', 'flowers:9.9.9', 'flowers/config']
)
def test_what_is_not_prepared_says_how_to(path):
  message = refusal(f'tfds:{path}')
  assert 'is not prepared' in message
  assert f"tfds.builder('{path}', file_format='array_record')" in message


@pytest.mark.parametrize('path', ['a b', '', '/none/there', 'gs://bucket/x'])
def test_what_is_no_name_is_refused(path):
  refusal(f'tfds:{path}')


def test_tfrecord_says_how_to_prepare_beside_it(root):
  edit(root, lambda info: info.update(fileFormat='tfrecord'))
  message = refusal('tfds:flowers')
  assert 'is prepared as tfrecord' in message
  beside = f'{root}/array_record'
  assert (
    f"tfds.builder('flowers:1.2.0', data_dir='{beside}', "
    "file_format='array_record').download_and_prepare()" in message
  )
  assert f'TFDS_DATA_DIR={beside}' in message


def test_array_record_beside_tfrecord_is_read(root):
  edit(
    root,
    lambda info: info.update(
      fileFormat='tfrecord', alternativeFileFormats=['array_record']
    ),
  )
  split = tfds.open_tfds('tfds:flowers').splits['train']
  assert split.read(3) == forms.of_split('train')[3].data


def test_missing_and_damaged_shards_are_named(root):
  file = next((root / 'flowers' / '1.2.0').glob('*train*record*'))
  data = file.read_bytes()
  file.write_bytes(data[:100])
  assert 'records of train from 0 on cannot be read' in refusal('tfds:flowers')
  file.unlink()
  assert f'lacks {file}' in refusal('tfds:flowers')


def test_a_shard_damaged_during_a_training_is_named(root):
  found = tfds.open_tfds('tfds:flowers')
  copy = pickle.loads(pickle.dumps(found.splits['train']))
  file = next((root / 'flowers' / '1.2.0').glob('*train*record*'))
  file.write_bytes(b'\0' * file.stat().st_size)
  with pytest.raises(
    errors.DataError, match='records of train from 5 on cannot'
  ):
    copy.read(5)


def test_splits_may_be_held_out_or_left_out(root):
  def rename(info):
    info['splits'][1]['name'] = 'unlabelled'

  for file in (root / 'flowers' / '1.2.0').glob('*validation*'):
    file.rename(str(file).replace('validation', 'unlabelled'))
  edit(root, rename)
  found = tfds.open_tfds('tfds:flowers')
  assert sum(len(found.splits[s]) for s in picture_set.SPLITS) == 45
  assert 'held out' in found.origin
  assert any('left out: unlabelled' in note for note in found.notes)


def test_a_test_split_without_labels_is_left_out(root, monkeypatch):
  for file in (root / 'flowers' / '1.2.0').glob('*validation*'):
    file.rename(str(file).replace('validation', 'test'))
  edit(root, lambda info: info['splits'][1].update(name='test'))
  found = tfds.open_tfds('tfds:flowers')
  assert len(found.splits['val']) == 15
  assert 'val is test' in found.origin
  original = tfds._read_table

  def without_labels(records, builder, path):
    table = original(records, builder, path).copy()
    if records.split == 'test':
      table[:, 1] = -1
    return table

  monkeypatch.setattr(tfds, '_read_table', without_labels)
  found = tfds.open_tfds('tfds:flowers')
  assert sum(len(found.splits[s]) for s in picture_set.SPLITS) == 45
  assert any('left out: test' in note for note in found.notes)


def test_without_a_label_there_are_no_classes(root):
  def change(content):
    content['featuresDict']['features'].pop('label')

  edit(root, change, 'features.json')
  found = tfds.open_tfds('tfds:flowers')
  assert found.class_names == ()
  assert not found.splits['train'].labels.any()
  assert any('no classes' in note for note in found.notes)
  assert found.splits['train'].read(7) == forms.of_split('train')[7].data


def test_a_picture_by_another_name_is_found_if_it_is_the_only_one(root):
  def change(content):
    features = content['featuresDict']['features']
    features['left'] = features.pop('image')

  edit(root, change, 'features.json')
  # The records still call it image.
  with pytest.raises(errors.DataError, match='cannot be read'):
    tfds.open_tfds('tfds:flowers')

  def again(content):
    features = content['featuresDict']['features']
    features['right'] = features['left']

  edit(root, again, 'features.json')
  assert '2 images in a record, among' in refusal('tfds:flowers')


def test_labels_are_read_once(monkeypatch, root):
  found = tfds.open_tfds('tfds:flowers')
  read = []
  original = tfds._read_records
  monkeypatch.setattr(
    tfds, '_read_records', lambda *args: read.append(args) or original(*args)
  )
  again = tfds.open_tfds('tfds:flowers')
  assert not read
  for split in picture_set.SPLITS:
    assert again.splits[split].digest == found.splits[split].digest
    np.testing.assert_array_equal(
      again.splits[split].labels, found.splits[split].labels
    )
  # What was prepared anew is read again, and so is a cache that was cut.
  file = next((root / 'flowers' / '1.2.0').glob('*train*record*'))
  os.utime(file, (1, 1))
  tfds.open_tfds('tfds:flowers')
  assert len(read) == 1
  for kept in pathlib.Path(os.environ['XDG_CACHE_HOME']).rglob('*.npy'):
    kept.write_bytes(kept.read_bytes()[:-8])
  tfds.open_tfds('tfds:flowers')
  assert len(read) == 3


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert len(tfds.open_tfds('tfds:flowers').splits['train']) == 45


def test_without_tfds_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  assert "pip install 'selfboottok_jax[tfds]'" in refusal('tfds:flowers')


READ = """
import sys
from selfboottok_jax import data
from selfboottok_jax.data import picture_set, tfds

if __name__ == '__main__':
  found = tfds.open_tfds('tfds:flowers')
  source = picture_set.PictureSource(found, 'train')
  batches = data.make_train_dataset(
    source, batch_size=8, image_size=8, seed=0, num_workers=0, num_threads=1
  )
  print([next(batches)['label'].tolist() for _ in range(3)])
  batches.close()
  assert 'tensorflow' not in sys.modules
"""


def test_tensorflow_is_never_imported(tmp_path):
  # A stand-in that is found as TensorFlow would be, and stops who imports it.
  package = tmp_path / 'stand_in' / 'tensorflow'
  package.mkdir(parents=True)
  mark = tmp_path / 'imported'
  (package / '__init__.py').write_text(
    f'import os, pathlib\npathlib.Path({str(mark)!r}).touch()\nos._exit(3)\n'
  )
  script = tmp_path / 'read.py'
  script.write_text(READ)
  root = pathlib.Path(__file__).parents[2]
  paths = f'{package.parent}{os.pathsep}{root}'

  def run(*command):
    return subprocess.run(
      [sys.executable, *command],
      env=os.environ | {'PYTHONPATH': paths},
      capture_output=True,
      text=True,
      check=False,
    )

  assert run('-c', 'import tensorflow').returncode == 3
  mark.unlink()
  result = run(str(script))
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('[') == 4
  assert not mark.exists()
