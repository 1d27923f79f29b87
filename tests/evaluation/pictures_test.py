import io

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.evaluation import pictures


def _images(count, height=32, width=32, seed=0):
  random = np.random.default_rng(seed)
  return random.integers(0, 200, (count, height, width, 3), np.uint8)


def test_grid_holds_every_image_in_reading_order():
  images = _images(5, 4, 6)
  result = pictures.grid(images, columns=3, pad=1, background=250)
  assert result.shape == (2 * 4 + 1, 3 * 6 + 2, 3)
  seen = np.zeros(result.shape[:2], bool)
  for index, image in enumerate(images):
    top, left = index // 3 * 5, index % 3 * 7
    np.testing.assert_array_equal(result[top : top + 4, left : left + 6], image)
    seen[top : top + 4, left : left + 6] = True
  assert (result[~seen] == 250).all()


@pytest.mark.parametrize('arguments', [(0, 3, 2), (3, 0, 2), (3, 2, -1)])
def test_grid_refuses_what_has_no_picture(arguments):
  count, columns, pad = arguments
  with pytest.raises(errors.UserError, match=r'(?s)grid .* at least one'):
    pictures.grid(_images(count), columns, pad)


@pytest.mark.parametrize(
  ('side', 'wanted'), [(8, 96), (32, 96), (64, 128), (96, 96), (256, 256)]
)
def test_enlarge_repeats_whole_pixels(side, wanted):
  images = _images(1, side, side)
  large = pictures.enlarge(images)
  assert large.shape == (1, wanted, wanted, 3)
  scale = wanted // side
  for offset in range(scale):
    np.testing.assert_array_equal(
      large[:, offset::scale, offset::scale], images
    )


def test_comparison_shows_each_row_beside_its_caption():
  rows = {'Originals': _images(4), 'Stage 1\n21.40 dB': _images(4, seed=1)}
  result = pictures.comparison(rows)
  left = result.shape[1] - 10 - (4 * 96 + 3 * 4)
  assert left > 60
  for top, images in zip((10, 10 + 96 + 10), rows.values(), strict=True):
    strip = result[top : top + 96, left : result.shape[1] - 10]
    np.testing.assert_array_equal(strip, pictures.strip(images))
    caption = result[top : top + 96, :left]
    assert caption.min() < 60, 'dark ink'
  # Two lines of letters fill more of the row than one.
  inked = [
    (result[top : top + 96, :left].min(axis=(1, 2)) < 128).sum()
    for top in (10, 116)
  ]
  assert inked[0] >= 10
  assert inked[1] > 1.5 * inked[0]
  assert (result[:10] == 255).all()
  assert (result[-10:] == 255).all()


def test_long_captions_are_wrapped_and_make_room():
  label = 'an aligner with a very long name ' * 6
  result = pictures.comparison({label: _images(1, 70, 70)})
  assert result.shape[0] > 150
  assert result.shape[1] < 400
  assert (result[:5] == 255).all()
  assert (result[-5:] == 255).all()


@pytest.mark.parametrize(
  'rows', [{}, {'a': _images(2), 'b': _images(3)}, {'a': _images(0)}]
)
def test_comparison_refuses_unequal_or_no_rows(rows):
  with pytest.raises(errors.UserError, match='at least one'):
    pictures.comparison(rows)


def test_png_files_are_exact_and_leave_nothing_else(tmp_path):
  image = _images(1, 20, 30)[0]
  path = pictures.save_png(tmp_path / 'new' / 'picture.png', image)
  with Image.open(path) as file:
    assert file.format == 'PNG'
    assert file.size == (30, 20)
    np.testing.assert_array_equal(np.array(file), image)
  assert [p.name for p in path.parent.iterdir()] == ['picture.png']
  with Image.open(io.BytesIO(pictures.png_bytes(image))) as file:
    np.testing.assert_array_equal(np.array(file), image)
