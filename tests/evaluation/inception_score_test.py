import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import inception_score


def _sure(classes, count=4):
  """Logits that are sure of a class."""
  return 200 * np.eye(count, dtype=np.float32)[np.asarray(classes)]


def test_score_of_known_sets():
  """The number of classes that occur, if all are equally frequent."""
  score = inception_score.score_in_parts_of
  np.testing.assert_allclose(score(_sure([0, 1, 2, 3])), 4)
  np.testing.assert_allclose(score(_sure([1, 1, 1])), 1)
  np.testing.assert_allclose(score(np.zeros((5, 4), np.float32)), 1)
  # Half of the pictures are 0 or 1 with equal chance, half are 0 for sure:
  # mean (3/4, 1/4), divergences log(2/3)/2 + log(2)/2 and log(4/3).
  logits = np.array([[0, 0], [200, 0]], np.float32)
  wanted = np.exp((np.log(4 / 3) / 2 + np.log(4 / 3)) / 2)
  np.testing.assert_allclose(score(logits), wanted)


def test_parts():
  logits = _sure([0, 0, 1, 1, 2])
  score = inception_score.score_in_parts_of
  # Parts (0, 0), (1, 1), (2): one class each.
  np.testing.assert_allclose(score(logits, 2), 1)
  # Parts (0, 0, 1, 1), (2).
  np.testing.assert_allclose(score(logits, 4), 1.5)
  # Edges 0, 1, 3, 5: parts (0), (0, 1), (1, 2).
  mean, deviation = inception_score.score_in_parts(logits, 3)
  np.testing.assert_allclose(mean, 5 / 3)
  np.testing.assert_allclose(deviation, np.std([1, 2, 2]))


def test_order_is_a_fixed_permutation():
  order = inception_score.shuffle(50)
  assert sorted(order) == list(range(50))
  assert order.tolist() != list(range(50))
  np.testing.assert_array_equal(order, inception_score.shuffle(50))


def test_errors():
  with pytest.raises(errors.DataError, match='no images'):
    inception_score.score_in_parts_of(np.zeros((0, 4), np.float32))
  with pytest.raises(errors.DataError, match='10 parts of 9'):
    inception_score.score_in_parts(np.zeros((9, 4), np.float32))
