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
