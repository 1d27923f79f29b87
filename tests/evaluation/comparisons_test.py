import numpy as np
import pytest

from selfboottok_jax import errors, inference
from selfboottok_jax.evaluation import comparisons


def _images(value, count=2):
  return np.full((count, 4, 4, 3), value, np.uint8)


def test_differences_are_scaled_and_end_in_the_lightest_colour():
  """Of channels 10, 20 and 60 the mean is 30, which is level 120 of 255."""
  import matplotlib

  table = matplotlib.colormaps['magma'](np.arange(256), bytes=True)[:, :3]
  a, b = _images(100), _images(100)
  b[0, 0, 0] = [110, 80, 160]
  b[0, 0, 1] = 250
  maps = comparisons.map_differences(a, b)
  np.testing.assert_array_equal(maps[0, 0, 0], table[4 * 30])
  np.testing.assert_array_equal(maps[0, 0, 1], table[255])
  np.testing.assert_array_equal(maps[1], np.broadcast_to(table[0], (4, 4, 3)))
  # From either side.
  np.testing.assert_array_equal(maps, comparisons.map_differences(b, a))


class _Darker(inference.ImageTokenizer):
  """Reconstructs pictures that are `by` levels darker."""

  step = 1000

  def __init__(self, by):
    self.by = by

  def encode(self, images):
    assert len(images) == 1
    return images

  def decode(self, codes):
    return (codes.astype(np.float32) - self.by) / 127.5 - 1


def test_all_tokenizers_see_the_same_pictures():
  originals = np.concatenate([_images(100, 1), _images(200, 1)])
  made = comparisons.compare(
    originals, {'near': _Darker(5), 'far': _Darker(51)}, 'a set'
  )
  labels = [row.label for row in made.rows]
  assert labels == [comparisons.ORIGINALS, 'near', 'far']
  np.testing.assert_array_equal(made.rows[2].images, originals - 51)
  assert made.rows[0].psnr is None
  # 51 is a fifth of the range: 20 log10(5).
  np.testing.assert_allclose(made.rows[2].psnr, 20 * np.log10(5), rtol=1e-6)
  for told in ('2 pictures of a set', 'near at 1,000', 'far at 1,000'):
    assert told in made.protocol
  assert made.differences(made.rows[0]) is None
  assert (
    made.differences(made.rows[1]).max() < made.differences(made.rows[2]).max()
  )


def test_what_is_no_comparison():
  row = comparisons.Row('twin', _images(1))
  for rows, told in (
    ([row, row], r"different names .*'twin'"),
    ([row, comparisons.Row('b', _images(1, 3))], 'as many images of one size'),
  ):
    with pytest.raises(errors.UserError, match=told):
      comparisons.Comparison(rows, 'protocol')
  with pytest.raises(errors.UserError, match='No protocol was given'):
    comparisons.Comparison([row], '')
