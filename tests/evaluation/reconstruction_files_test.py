import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import image_sets, reconstruction_files

NAMES = ['a/1.jpg', 'a/2.jpg', 'b/3.jpg']
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), np.uint8)


@pytest.mark.parametrize('name', ['folder', 'x.npz'])
def test_reconstructions_are_read_back(name, tmp_path):
  path = tmp_path / 'new' / name
  reconstruction_files.check(path, 'flag')
  with reconstruction_files.writing(path, NAMES, (6, 8)) as writer:
    writer.add(IMAGES[:2])
    writer.add(IMAGES[2:])
  opened = image_sets.open_images(path, flag='samples')
  assert list(opened.names) == ['a/1.png', 'a/2.png', 'b/3.png']
  (batch,) = opened.batches(8)
  np.testing.assert_array_equal(batch['image'][batch['mask']], IMAGES)


def test_an_npz_file_appears_whole(tmp_path):
  path = tmp_path / 'x.npz'

  def stop():
    with reconstruction_files.writing(path, NAMES, (6, 8)) as writer:
      writer.add(IMAGES[:1])
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stop()
  assert not list(tmp_path.iterdir())


def test_places_that_are_taken(tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('')
  (tmp_path / 'dir.npz').mkdir()
  for name, told in (
    ('full', 'is not empty'),
    ('dir.npz', 'is a folder'),
    ('full/file/x', 'is no folder'),
    ('full/file/x.npz', 'is no folder'),
  ):
    with pytest.raises(errors.ConfigError, match=f'--flag=.*{told}'):
      reconstruction_files.check(tmp_path / name, 'flag')
