import io
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.evaluation import image_sets

SIZE = 8


def _picture(index, size=(SIZE, SIZE)):
  rng = np.random.default_rng(index)
  return rng.integers(0, 256, (*size, 3), np.uint8)


def _write(folder, names, size=(SIZE, SIZE)):
  """Picture i under the name i of `names`, of which it is the number."""
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    index = int(path.name.split('.')[0])
    Image.fromarray(_picture(index, size)).save(path, 'PNG')
  return folder


def _open(path, flag='samples'):
  return image_sets.open_images(path, flag=flag)


def _images(opened, **options):
  """All images without padding."""
  batches = list(opened.batches(8, **options))
  mask = np.concatenate([batch['mask'] for batch in batches])
  return np.concatenate([batch['image'] for batch in batches])[mask]


def test_a_folder_a_tar_and_an_npz_hold_the_same(tmp_path):
  names = [f'{c}/{i}.png' for c in 'ab' for i in range(5)]
  folder = _write(tmp_path / 'x', names)
  with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
    tar.add(folder, 'x')
  images = np.stack([_picture(i % 5) for i in range(10)])
  np.savez(tmp_path / 'x.npz', arr_0=images, names=np.array(names))
  for path in (folder, tmp_path / 'x.tar', tmp_path / 'x.npz'):
    opened = _open(path)
    assert opened.count == 10
    assert opened.image_size == (SIZE, SIZE)
    assert list(opened.names) == names
    np.testing.assert_array_equal(_images(opened), images)


def test_a_split_counts_where_there_are_splits(tmp_path):
  _write(tmp_path, ['train/c/1.png', 'val/c/2.png', 'val/d/3.png'])
  opened = _open(tmp_path)
  assert list(opened.names) == ['c/2.png', 'd/3.png']
  other = image_sets.open_images(tmp_path, flag='samples', split='train')
  assert list(other.names) == ['c/1.png']


def test_a_folder_of_launch_sample(tmp_path):
  _write(tmp_path / 'images', ['1.png', '2.png'])
  _write(tmp_path / 'grids', ['3.png'])
  (tmp_path / 'sampling.json').write_text('{}')
  with pytest.raises(errors.DataError, match='launch.sample command again'):
    _open(tmp_path)
  _write(tmp_path, ['9.png']).joinpath('9.png').rename(tmp_path / 'grid.png')
  assert list(_open(tmp_path).names) == ['1.png', '2.png']
  # Arrays in place of files.
  for name in ('1.png', '2.png'):
    (tmp_path / 'images' / name).unlink()
  (tmp_path / 'images').rmdir()
  np.savez(tmp_path / 'samples.npz', arr_0=np.stack([_picture(1)] * 3))
  assert _open(tmp_path).count == 3


@pytest.mark.parametrize(
  ('samples', 'originals', 'rows'),
  [
    # The same names, whatever the endings, of some of the originals.
    (['a/2.png', 'b/1.png'], ['a/1.jpg', 'a/2.jpg', 'b/1.jpg'], [1, 2]),
    # Names that differ in their ending alone.
    (['1.jpg.png', '1.png.png'], ['1.jpg', '1.png', '2.jpg'], [0, 1]),
    # One class, whose folder holds everything.
    (['b/1.png'], ['a/1.jpg', 'b/1.jpg'], [1]),
    # Without the folders of the originals.
    (['3.png', '4.png'], ['a/3.jpg', 'b/4.jpg', 'b/5.jpg'], [0, 1]),
  ],
)
def test_pairs_are_found_by_name(samples, originals, rows, tmp_path):
  made = _open(_write(tmp_path / 'made', samples))
  real = _open(_write(tmp_path / 'real', originals), 'pairs')
  np.testing.assert_array_equal(image_sets.pair(made, real), rows)


def test_names_of_images_made_of_originals_find_them(tmp_path):
  originals = ['a/1.jpg', 'a/1.png', 'b/2.webp', 'b/3.x.jpg']
  names = image_sets.image_names(originals)
  assert names == ['a/1.jpg.png', 'a/1.png.png', 'b/2.png', 'b/3.x.png']
  made = _open(_write(tmp_path / 'made', names))
  real = _open(_write(tmp_path / 'real', originals), 'pairs')
  np.testing.assert_array_equal(image_sets.pair(made, real), range(4))
  # No name leads out of a folder.
  for name in image_sets.image_names(['../../x.jpg', '/etc/./y.jpg']):
    path = pathlib.PurePosixPath(name)
    assert not path.is_absolute()
    assert '..' not in path.parts


def test_arrays_are_paired_by_their_order(tmp_path):
  images = np.stack([_picture(i) for i in range(3)])
  np.savez(tmp_path / 'a.npz', arr_0=images)
  made, real = _open(tmp_path / 'a.npz'), _open(tmp_path / 'a.npz', 'pairs')
  np.testing.assert_array_equal(image_sets.pair(made, real), range(3))
  folder = _open(_write(tmp_path / 'real', ['1.png', '2.png']), 'pairs')
  with pytest.raises(errors.DataError, match='3 images .* and 2 in'):
    image_sets.pair(made, folder)


@pytest.mark.parametrize(
  ('samples', 'originals', 'told'),
  [
    (['1.png', '2.png', '7.png'], ['1.jpg', '2.jpg'], '1 of 3 .*as 7.png'),
    (['a/1.png'], ['b/1.jpg', 'c/1.jpg'], 'no original'),
    (['a/1.png', 'b/1.png'], ['1.jpg'], 'the same original'),
  ],
)
def test_images_without_an_original(samples, originals, told, tmp_path):
  made = _open(_write(tmp_path / 'made', samples))
  real = _open(_write(tmp_path / 'real', originals), 'pairs')
  with pytest.raises(errors.DataError, match=told):
    image_sets.pair(made, real)


def test_images_of_several_sizes(tmp_path):
  _write(tmp_path, ['1.png', '2.png'])
  _write(tmp_path, ['3.png'], (SIZE, 12))
  opened = _open(tmp_path)
  with pytest.raises(errors.DataError, match='3.png is 8x12, the first image'):
    _images(opened)
  # Originals are cropped to the size of what was made of them.
  assert _images(opened, crop=SIZE).shape == (3, SIZE, SIZE, 3)


def _npz(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


@pytest.mark.parametrize(
  ('content', 'told'),
  [
    (_npz(arr_0=np.zeros((2, 8, 8, 3), np.float32)), 'float32'),
    (_npz(arr_0=np.zeros((2, 3, 8, 8), np.uint8)), r'\(2, 3, 8, 8\)'),
    (_npz(arr_0=np.array([{}, {}])), 'objects'),
    (_npz(other=np.zeros(3)), 'no array arr_0, only other'),
    (_npz(arr_0=np.zeros((9, 8, 8, 3), np.uint8))[:-900], 'cut short'),
    (b'', 'no .npz file'),
  ],
)
def test_files_that_hold_no_images(content, told, tmp_path):
  (tmp_path / 'x.npz').write_bytes(content)
  with pytest.raises(errors.DataError, match=told):
    _open(tmp_path / 'x.npz')


def test_places_without_images(tmp_path):
  for path, told in (
    (tmp_path, 'holds no images'),
    (tmp_path / 'lost', 'does not exist'),
    ('', 'is empty'),
  ):
    with pytest.raises(errors.UserError, match=told) as caught:
      _open(path)
    assert '--samples=' in str(caught.value)
  (tmp_path / '1.png').write_bytes(b'')
  with pytest.raises(errors.DataError, match='such as 1.png'):
    _open(tmp_path)
