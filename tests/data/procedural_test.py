import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from selfboottok_jax.data import procedural

_PROGRAM = """
import hashlib
from selfboottok_jax.data import procedural
source = procedural.ProceduralSource('train', 32)
data = b''.join(source[i]['image'].tobytes() for i in range(12))
print(hashlib.sha256(data).hexdigest())
"""


def test_every_process_draws_the_same_bytes():
  source = pickle.loads(pickle.dumps(procedural.ProceduralSource('train', 32)))
  data = b''.join(source[i]['image'].tobytes() for i in range(12))
  program = [sys.executable, '-c', _PROGRAM]
  other = subprocess.run(program, capture_output=True, check=True, text=True)
  assert other.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_a_scene_is_the_same_at_every_size():
  small = procedural.ProceduralSource('train', 32)
  large = procedural.ProceduralSource('train', 128)
  for i in range(10):
    one, two = small[i], large[i]
    assert one['label'] == two['label']
    shrunk = two['image'].reshape(32, 4, 32, 4, 3).mean((1, 3))
    error = np.abs(shrunk - one['image']).mean()
    other = np.abs(shrunk - small[i + 1]['image']).mean()
    assert error < 3
    assert other > 8 * error


def test_splits_and_indices_give_different_scenes():
  train = procedural.ProceduralSource('train', 16)
  val = procedural.ProceduralSource('val', 16)
  drawn = {s[i]['image'].tobytes() for s in (train, val) for i in range(50)}
  assert len(drawn) == 100
  assert (len(train), len(val)) == (50_000, 2_000)
  assert len(procedural.ProceduralSource('val', 16, length=7)) == 7
  with pytest.raises(IndexError):
    val[2_000]


def test_classes_are_balanced_also_in_even_strides():
  labels = [procedural.make_scene('val', i).label for i in range(2000)]
  for stride in (1, 2, 5, 10):
    counts = np.bincount(labels[::stride], minlength=10)
    wanted = 200 / stride
    assert np.abs(counts - wanted).max() < 5 * np.sqrt(wanted)


def test_the_outline_always_shows():
  for i in range(200):
    scene = procedural.make_scene('train', i)
    levels = [np.mean([s.near, s.far]) for s in (scene.shape, scene.background)]
    assert abs(levels[0] - levels[1]) > 0.1


def test_fingerprint_tells_split_size_and_length():
  prints = {
    procedural.ProceduralSource(*given).fingerprint
    for given in [('train', 32), ('val', 32), ('train', 64), ('train', 32, 9)]
  }
  assert len(prints) == 4
