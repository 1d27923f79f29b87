import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import precision_recall


def _squares(a, b):
  """Squared distances [n, m], from differences in float64."""
  shift = a[:, None].astype(np.float64) - b[None]
  return np.square(shift).sum(axis=2)


def _brute_force(real, made, k=3):
  """The definition: balls as large as the k-th neighbour besides oneself."""

  def radii(x):
    return np.sort(_squares(x, x), axis=1)[:, k]

  between = _squares(real, made)
  precision = (between <= radii(real)[:, None]).any(axis=0).mean()
  recall = (between <= radii(made)[None]).any(axis=1).mean()
  return precision, recall


def _features(count, width=6, seed=0, shift=0.0):
  rng = np.random.default_rng(seed)
  return (shift + rng.standard_normal((count, width))).astype(np.float32)


@pytest.mark.parametrize(('rows', 'columns'), [(1024, 4096), (16, 24)])
def test_equals_brute_force_for_every_block(monkeypatch, rows, columns):
  monkeypatch.setattr(precision_recall, 'ROWS', rows)
  monkeypatch.setattr(precision_recall, 'COLUMNS', columns)
  real, made = _features(90), _features(61, seed=1, shift=0.8)
  found = precision_recall.precision_recall(real, made)
  assert found == _brute_force(real, made)
  assert 0 < found[0] < 1
  assert 0 < found[1] < 1
  np.testing.assert_allclose(
    precision_recall.radii(real),
    np.sort(_squares(real, real), axis=1)[:, 3],
    rtol=1e-12,
  )


def test_large_offsets_lose_nothing():
  """Distances of 1 among features of length 1e4: float32 products lose them."""
  real, made = _features(80), _features(70, seed=1, shift=0.8)
  there = [np.float32(4096) + x.round(3) for x in (real, made)]
  assert precision_recall.precision_recall(*there) == _brute_force(*there)


def test_ties_are_inside():
  """Points at equal distance of a line, and copies of one point."""
  line = np.arange(9, dtype=np.float32)[:, None]
  # The third neighbour of the first is at 3, of an inner one at 2.
  np.testing.assert_array_equal(
    precision_recall.radii(line), [9, 4, 4, 4, 4, 4, 4, 4, 9]
  )
  edge, beyond = np.float32([[-3]]), np.float32([[-3.01]])
  inside = precision_recall.contains(
    line, precision_recall.radii(line), np.concatenate([edge, beyond])
  )
  np.testing.assert_array_equal(inside, [True, False])
  copies = np.tile(_features(1, width=300, seed=5), (7, 1))
  assert precision_recall.precision_recall(copies, copies) == (1.0, 1.0)
  apart = copies + np.float32(1e-3)
  assert precision_recall.precision_recall(copies, apart) == (0.0, 0.0)


def test_too_few_images():
  real = _features(9)
  with pytest.raises(errors.DataError, match='3 images with 3 neighbours'):
    precision_recall.precision_recall(real, real[:3])
