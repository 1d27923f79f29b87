import io
import tarfile

import numpy as np
import pytest
from scipy import io as scipy_io

from selfboottok_jax import errors
from selfboottok_jax.data import labels, layout

TENCH, GOLDFISH, SHARK = 'n01440764', 'n01443537', 'n01484850'
NAMES = [f'ILSVRC2012_val_0000000{i}.JPEG' for i in range(1, 5)]
WANTED = [SHARK, TENCH, GOLDFISH, TENCH]


def listing(names=NAMES, folder=''):
  found = layout.Listing()
  for name in reversed(names):
    found.files[folder + name] = layout.File(1, name)
  found.files['readme.txt'] = layout.File(1, 'readme.txt')
  return found


def meta():
  """The devkit's meta.mat, whose numbers are in no order."""
  kind = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O')]
  rows = [(3, TENCH, 'tench'), (1, GOLDFISH, 'goldfish'), (2, SHARK, 'shark')]
  table = np.array(rows, dtype=kind).reshape(-1, 1)
  buffer = io.BytesIO()
  scipy_io.savemat(buffer, {'synsets': table})
  return buffer.getvalue()


def classes(tmp_path, *files, names=NAMES, folder=''):
  paths = []
  for name, content in files:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    paths.append(str(tmp_path / name))
  moved = labels.label_pictures(listing(names, folder), paths)
  assert 'readme.txt' in moved.files
  found = {}
  for path, file in moved.files.items():
    if path != 'readme.txt':
      assert path.startswith(folder)
      class_name, _, base = path.removeprefix(folder).partition('/')
      assert base == file.address
      found[base] = class_name
  return [found[name] for name in sorted(names)]


TRUTH = 'ILSVRC2012_validation_ground_truth.txt'


@pytest.mark.parametrize(
  'files',
  [
    [('synset_labels.txt', '\n'.join(WANTED) + '\n')],
    [('val.txt', '\n'.join(f'{n} {w}' for n, w in zip(NAMES, WANTED,
                                                      strict=True)))],
    # Kaggle's, in any order, without endings, with boxes.
    [('LOC_val_solution.csv', 'ImageId,PredictionString\n' + '\n'.join(
      f'{n[:-5]},{w} 85 1 499 272 {w} 1 2 3 4'
      for n, w in reversed(list(zip(NAMES, WANTED, strict=True)))))],
    # Caffe's, numbers from 0 in the order of the synsets.
    [('val.txt', '\n'.join(f'{n} {i}' for n, i in zip(NAMES, (2, 0, 1, 0),
                                                      strict=True)))],
    # The devkit's numbers, with its map in two forms.
    [(TRUTH, '2\n3\n1\n3\n'), ('meta.mat', meta())],
    [(TRUTH, '2\n3\n1\n3\n'), ('map_clsloc.txt', f'{TENCH} 3 tench\n'
      f'{GOLDFISH} 1 goldfish\n{SHARK} 2 great_white_shark\n')],
  ],
)  # fmt: skip
@pytest.mark.parametrize('folder', ['', 'val/'])
def test_forms_of_labels(tmp_path, files, folder):
  assert classes(tmp_path, *files, folder=folder) == WANTED


def test_the_devkit_as_it_comes(tmp_path):
  packed = tmp_path / 'ILSVRC2012_devkit_t12.tar.gz'
  with tarfile.open(packed, 'w:gz') as archive:
    for name, data in ((TRUTH, b'2\n3\n1\n3\n'), ('meta.mat', meta())):
      info = tarfile.TarInfo(f'ILSVRC2012_devkit_t12/data/{name}')
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  moved = labels.label_pictures(listing(), [str(packed)])
  assert f'{SHARK}/{NAMES[0]}' in moved.files
  with tarfile.open(packed) as archive:
    archive.extractall(tmp_path, filter='data')
  folder = tmp_path / 'ILSVRC2012_devkit_t12'
  again = labels.label_pictures(listing(), [str(folder)])
  assert again.files == moved.files
  # The truth alone, with its map beside it.
  again = labels.label_pictures(listing(), [str(folder / 'data' / TRUTH)])
  assert again.files == moved.files


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ([('a.txt', '')], 'is empty'),
    ([('a.txt', f'{TENCH}\n')], 'has 1 labels for 4 images'),
    ([('a.csv', f'image,label\nother,{TENCH}\n')], 'no label for 4 of 4'),
    ([(TRUTH, '2\n3\n1\n3\n')], 'numbers from 1.*meta.mat'),
    ([('a.txt', '0\n1\n2\n1000\n')], 'label 1000, which maps to no class'),
    ([('a.txt', 'a\n'), ('b.txt', 'b\n')], 'two files of labels'),
    ([('meta.mat', b'no mat')], 'is no meta.mat'),
    ([('map.txt', f'{TENCH} 3 tench\n')], 'has no labels'),
  ],
)
def test_unusable_labels_are_named(tmp_path, files, message):
  with pytest.raises(errors.DataError, match=message) as caught:
    classes(tmp_path, *files)
  assert '\n' not in str(caught.value)


def test_labels_for_class_folders_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match='no val folder has images'):
    classes(tmp_path, ('a.txt', 'x\n'), names=['a/1.png', 'b/1.png'])
  with pytest.raises(errors.DataError, match='cannot read the labels'):
    labels.label_pictures(listing(), [str(tmp_path / 'nowhere.txt')])


def test_tiny_imagenet(tmp_path):
  found = layout.Listing()
  for name in ('train/n01440764/images/a.JPEG', 'train/n01443537/images/b.JPEG',
               'val/images/val_0.JPEG', 'val/images/val_1.JPEG'):  # fmt: skip
    found.files[name] = layout.File(1, name)
  file = tmp_path / 'val_annotations.txt'
  file.write_text(
    'val_0.JPEG\tn01443537\t0\t32\t44\t62\nval_1.JPEG\tn01440764\t5\t5\t6\t7\n'
  )
  moved = labels.label_pictures(found, [str(file)])
  assert {name for name in moved.files if name[:3] == 'val'} == {
    'val/n01443537/val_0.JPEG',
    'val/n01440764/val_1.JPEG',
  }


@pytest.mark.parametrize(
  ('text', 'classes'),
  [
    ('0.png,great white shark\n1.png,tiger\n', ('great white shark', 'tiger')),
    ('0.png great white shark\n1.png tiger\n', ('great white shark', 'tiger')),
    (
      '0.png\tgreat white shark\n1.png\ttiger\n',
      ('great white shark', 'tiger'),
    ),
    ('0.png,1\n1.png,0\n', ('1', '0')),
  ],
)
def test_classes_of_ones_own(tmp_path, text, classes):
  found = layout.Listing()
  names = [*(f'train/{name}/x.png' for name in classes), 'val/0.png',
           'val/1.png']  # fmt: skip
  for name in names:
    found.files[name] = layout.File(1, name)
  (tmp_path / 'own.txt').write_text(text)
  moved = labels.label_pictures(found, [str(tmp_path / 'own.txt')])
  assert set(moved.files) - set(names) == {
    f'val/{name}/{i}.png' for i, name in enumerate(classes)
  }


def test_numbers_that_name_no_class_are_refused(tmp_path):
  found = layout.Listing()
  for name in ('train/cat/x.png', 'train/dog/x.png', 'val/0.png'):
    found.files[name] = layout.File(1, name)
  (tmp_path / 'own.txt').write_text('0.png 1\n')
  with pytest.raises(errors.DataError, match='no class folders have these'):
    labels.label_pictures(found, [str(tmp_path / 'own.txt')])
