import numpy as np
import pytest

from selfboottok_jax.data import shapes


@pytest.mark.parametrize('name', shapes.SHAPES)
def test_shapes_have_an_area_that_shows_and_fits(name):
  line = np.linspace(-1.5, 1.5, 151, dtype=np.float32)
  inside = shapes.SHAPES[name](*np.meshgrid(line, line)) < 0
  assert 0.08 < inside.mean() < 0.35
  x, y = np.meshgrid(line, line)
  assert np.hypot(x, y)[inside].max() < 1.25


def test_shapes_are_told_apart_whatever_their_rotation():
  line = np.linspace(-1.2, 1.2, 32, dtype=np.float32)
  x, y = np.meshgrid(line, line)
  turns = np.linspace(0, 2 * np.pi, 72, endpoint=False)
  upright = [distance(x, y) < 0 for distance in shapes.SHAPES.values()]
  for i, distance in enumerate(shapes.SHAPES.values()):
    for turn in map(float, turns):
      c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
      turned = distance(c * x + s * y, c * y - s * x) < 0
      for other in upright[:i]:
        overlap = (turned & other).sum() / (turned | other).sum()
        # Disc and square of one area come closest.
        assert overlap < 0.88


@pytest.mark.parametrize('name', shapes.TEXTURES)
def test_textures_repeat_and_stay_in_range(name):
  line = np.linspace(0, 2, 64, dtype=np.float32)
  u, v = np.meshgrid(line, line)
  one = shapes.TEXTURES[name](u, v)
  # Checks alternate: two of their cells are a period along each axis.
  two = shapes.TEXTURES[name](u + 2, v)
  np.testing.assert_allclose(one, two, atol=1e-4)
  assert np.abs(one).max() <= 2.2
  assert (np.ptp(one) > 1) == (name != 'plain')
