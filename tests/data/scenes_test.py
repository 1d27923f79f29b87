import dataclasses
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from selfboottok_jax.data import scenes

_PROGRAM = """
import hashlib
from selfboottok_jax.data import scenes
source = scenes.ProceduralSource('train', 32)
data = b''.join(source[i]['image'].tobytes() for i in range(12))
print(hashlib.sha256(data).hexdigest())
"""


def test_every_process_draws_the_same_bytes():
  source = pickle.loads(pickle.dumps(scenes.ProceduralSource('train', 32)))
  data = b''.join(source[i]['image'].tobytes() for i in range(12))
  program = [sys.executable, '-c', _PROGRAM]
  other = subprocess.run(program, capture_output=True, check=True, text=True)
  assert other.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_a_scene_is_the_same_at_every_size():
  small = scenes.ProceduralSource('train', 32)
  large = scenes.ProceduralSource('train', 128)
  for i in range(10):
    one, two = small[i], large[i]
    assert one['label'] == two['label']
    shrunk = two['image'].reshape(32, 4, 32, 4, 3).mean((1, 3))
    error = np.abs(shrunk - one['image']).mean()
    other = np.abs(shrunk - small[i + 1]['image']).mean()
    assert error < 3
    assert other > 8 * error


@pytest.mark.parametrize('size', [(32, 64), (64, 32), (48, 128), (128, 200)])
def test_rectangles_show_more_of_the_same(size):
  height, width = size
  source = scenes.ProceduralSource('train', size)
  for i in range(5):
    picture = source[i]['image']
    assert picture.shape == (height, width, 3)
    scene = scenes.make_scene('train', i)
    # Not stretched: a square window around the centre of the shape is what a
    # square picture has around it, but for the background's gradient.
    cover = _cover(scene, size)
    other = _cover(scene, min(size))
    assert 0.97 < cover.sum() / other.sum() < 1.03
    # All of it is inside.
    assert not cover[[0, -1]].any()
    assert not cover[:, [0, -1]].any()


def test_places_reach_along_the_longer_side():
  wide = [_centre(i, (32, 96)) for i in range(60)]
  tall = [_centre(i, (96, 32)) for i in range(60)]
  columns, rows = ([p[axis] for p in wide] for axis in (1, 0))
  # The shapes are 9 to 13 pixels in radius.
  assert np.ptp(columns) > 50
  assert np.ptp(rows) < 16
  np.testing.assert_allclose(np.ptp([p[0] for p in tall]), np.ptp(columns), 0.3)


def test_the_size_is_part_of_the_fingerprint():
  sizes = [32, (32, 48), (48, 32)]
  prints = {scenes.ProceduralSource('val', s).fingerprint for s in sizes}
  assert len(prints) == 3
  # That of square scenes is known to runs.
  content = b'scenes 2 val 2000 32'
  assert hashlib.sha256(content).hexdigest() in prints
  named = repr(scenes.ProceduralSource('val', (32, 48)))
  assert named == 'built-in scenes, 32x48 (val)'


def _cover(scene, size):
  """Pixels that the shape changes, shadow apart."""
  plain = dataclasses.replace(
    scene,
    shadow=(0.0, 0.0),
    shape=dataclasses.replace(
      scene.shape, near=np.ones(3), far=np.ones(3), texture='plain'
    ),
    background=dataclasses.replace(
      scene.background, near=np.zeros(3), far=np.zeros(3)
    ),
  )
  return scenes.render(plain, size)[..., 0] > 127


def _centre(index, size):
  """Row and column of the middle of a shape."""
  rows, columns = np.nonzero(_cover(scenes.make_scene('train', index), size))
  return rows.mean(), columns.mean()


def test_splits_and_indices_give_different_scenes():
  train = scenes.ProceduralSource('train', 16)
  val = scenes.ProceduralSource('val', 16)
  drawn = {s[i]['image'].tobytes() for s in (train, val) for i in range(50)}
  assert len(drawn) == 100
  assert (len(train), len(val)) == (50_000, 2_000)
  assert len(scenes.ProceduralSource('val', 16, length=7)) == 7
  with pytest.raises(IndexError):
    val[2_000]


def test_classes_are_balanced_also_in_even_strides():
  labels = [scenes.make_scene('val', i).label for i in range(2000)]
  for stride in (1, 2, 5, 10):
    counts = np.bincount(labels[::stride], minlength=10)
    wanted = 200 / stride
    assert np.abs(counts - wanted).max() < 5 * np.sqrt(wanted)


def test_the_outline_always_shows():
  for i in range(200):
    scene = scenes.make_scene('train', i)
    levels = [np.mean([s.near, s.far]) for s in (scene.shape, scene.background)]
    assert abs(levels[0] - levels[1]) > 0.1


def test_fingerprint_tells_split_size_and_length():
  prints = {
    scenes.ProceduralSource(*given).fingerprint
    for given in [('train', 32), ('val', 32), ('train', 64), ('train', 32, 9)]
  }
  assert len(prints) == 4


@pytest.mark.parametrize('name', scenes.SHAPES)
def test_shapes_have_an_area_that_shows_and_fits(name):
  line = np.linspace(-1.5, 1.5, 151, dtype=np.float32)
  inside = scenes.SHAPES[name](*np.meshgrid(line, line)) < 0
  assert 0.08 < inside.mean() < 0.35
  x, y = np.meshgrid(line, line)
  assert np.hypot(x, y)[inside].max() < 1.25


def test_shapes_are_told_apart_whatever_their_rotation():
  line = np.linspace(-1.2, 1.2, 32, dtype=np.float32)
  x, y = np.meshgrid(line, line)
  turns = np.linspace(0, 2 * np.pi, 72, endpoint=False)
  upright = [distance(x, y) < 0 for distance in scenes.SHAPES.values()]
  for i, distance in enumerate(scenes.SHAPES.values()):
    for turn in map(float, turns):
      c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
      turned = distance(c * x + s * y, c * y - s * x) < 0
      for other in upright[:i]:
        overlap = (turned & other).sum() / (turned | other).sum()
        # Disc and square of one area come closest.
        assert overlap < 0.88


@pytest.mark.parametrize('name', scenes.TEXTURES)
def test_textures_repeat_and_stay_in_range(name):
  line = np.linspace(0, 2, 64, dtype=np.float32)
  u, v = np.meshgrid(line, line)
  one = scenes.TEXTURES[name](u, v)
  # Checks alternate: two of their cells are a period along each axis.
  two = scenes.TEXTURES[name](u + 2, v)
  np.testing.assert_allclose(one, two, atol=1e-4)
  assert np.abs(one).max() <= 2.2
  assert (np.ptp(one) > 1) == (name != 'plain')
