import io
import zipfile

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import npz_files


class Bomb:
  """Writes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (str(self.path), 'w'))


def _images(count=5, height=6, width=4):
  size = count * height * width * 3
  return np.arange(size, dtype=np.uint8).reshape(count, height, width, 3)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_images_in_batches(tmp_path, save):
  save(tmp_path / 'a.npz', arr_0=_images(), arr_1=np.arange(5))
  file = npz_files.NpzFile(tmp_path / 'a.npz')
  assert file.shapes == {'arr_0': (5, 6, 4, 3), 'arr_1': (5,)}
  assert file.image_size() == (6, 4)
  np.testing.assert_array_equal(file.read('arr_1'), np.arange(5))
  batches = list(file.batches(2))
  assert [b['mask'].tolist() for b in batches] == [[True] * 2] * 2 + [
    [True, False]
  ]
  images = np.concatenate([b['image'][b['mask']] for b in batches])
  np.testing.assert_array_equal(images, _images())


def test_processes_share_batches(tmp_path):
  np.savez(tmp_path / 'a.npz', arr_0=_images())
  file = npz_files.NpzFile(tmp_path / 'a.npz')
  shares = [
    list(file.batches(4, process_index=i, process_count=2)) for i in (0, 1)
  ]
  for whole, *parts in zip(file.batches(4), *shares, strict=True):
    for name, array in whole.items():
      joined = np.concatenate([part[name] for part in parts])
      np.testing.assert_array_equal(joined, array)
  with pytest.raises(errors.ConfigError, match='batch_size=3'):
    next(file.batches(3, process_count=2))


def _one_line(match):
  return pytest.raises(errors.DataError, match=rf'\A[^\n]*{match}[^\n]*\Z')


def test_damaged_files(tmp_path):
  path = tmp_path / 'a.npz'
  with _one_line('does not exist'):
    npz_files.NpzFile(path)
  path.write_bytes(b'no zip')
  with _one_line('no .npz file'):
    npz_files.NpzFile(path)
  np.savez(path, arr_0=_images())
  whole = path.read_bytes()
  for length in (10, 100, len(whole) - 30):
    path.write_bytes(whole[:length])
    with _one_line('cut short'):
      npz_files.NpzFile(path)
  # A flipped bit in the numbers fails the checksum when they are read.
  damaged = bytearray(whole)
  damaged[250] ^= 1
  path.write_bytes(damaged)
  with _one_line('damaged'):
    npz_files.NpzFile(path).read('arr_0')
  with _one_line('damaged'):
    list(npz_files.NpzFile(path).batches(5))


def test_an_array_that_is_shorter_than_it_says(tmp_path):
  buffer = io.BytesIO()
  np.save(buffer, _images())
  with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as archive:
    archive.writestr('arr_0.npy', buffer.getvalue()[:-7])
  with _one_line('arr_0 was cut short'):
    npz_files.NpzFile(tmp_path / 'a.npz')


def test_no_object_is_loaded(tmp_path):
  path, ran = tmp_path / 'a.npz', tmp_path / 'ran'
  np.savez(path, mu=np.array([Bomb(ran)], object), arr_0=_images())
  with _one_line('objects in mu'):
    npz_files.NpzFile(path)
  np.array([Bomb(ran)], object).dump(path)
  with _one_line('no .npz file'):
    npz_files.NpzFile(path)
  assert not ran.exists()


def test_arrays_that_are_no_images(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez(
    path,
    float=_images() / 255,
    grey=_images()[..., :1],
    fortran=np.asfortranarray(_images()),
  )
  file = npz_files.NpzFile(path)
  for name in file.shapes:
    with _one_line(f'{name} is .* wanted images'):
      file.image_size(name)
  with _one_line('has no array arr_0, only float, grey, fortran'):
    file.image_size()
  with _one_line(r'float has the shape \(5, 6, 4, 3\), wanted \(2,\)'):
    file.read('float', (2,))
