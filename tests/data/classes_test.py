import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import classes


def from_texts(*given):
  texts = list(dict.fromkeys(given))
  codes = np.array([texts.index(text) for text in given], np.int32)
  return classes.from_texts(codes, texts, str)


def test_names_are_sorted():
  found = from_texts('rose', 'aster', 'rose', '7')
  assert found.names == ('7', 'aster', 'rose')
  assert found.labels.tolist() == [2, 1, 2, 0]
  assert found.labels.dtype == np.int32


def test_texts_that_are_all_numbers_are_labels():
  found = from_texts('10', '9', '2')
  assert found.labels.tolist() == [10, 9, 2]
  assert found.names == tuple(map(str, range(11)))
  assert '8 from 0 to 10 have no images' in found.notes[0]


def test_numbers_too_long_for_labels_are_names():
  long = '9' * 400
  assert from_texts(long, '1').names == ('1', long)


def test_numbers_take_given_names():
  found = classes.from_numbers(np.array([1, 0, 1]), ('b', 'a', 'c'), str)
  assert found.names == ('b', 'a', 'c')
  assert found.labels.tolist() == [1, 0, 1]
  assert not found.notes


@pytest.mark.parametrize(
  ('values', 'names', 'message'),
  [
    ([0, -1], (), r'1 is of class -1, which means that it has no label'),
    ([3, 0], ('a', 'b'), r'0 is of class 3; wanted a number from 0 to 1 \(1 '),
    ([0, 100_000], (), r'1 is of class 100000; wanted'),
  ],
)
def test_numbers_that_are_no_labels_are_named(values, names, message):
  with pytest.raises(errors.DataError, match=message):
    classes.from_numbers(np.array(values), names, str)


def test_pictures_without_classes_are_of_class_0():
  found = classes.none(3, 'why')
  assert found.labels.tolist() == [0, 0, 0]
  assert found.names == ()
  assert found.notes == ('why',)


@pytest.mark.parametrize(
  ('names', 'note'),
  [
    (('class_1', 'class_10', 'class_2'), 'class_10 comes before class_2'),
    (('a', 'b2', 'b3'), ''),
    (('n01440764', 'n01443537'), ''),
    (('10x', '9x', 'x'), '10x comes before 9x'),
    (('7', '07b', 'b'), ''),
    ((), ''),
  ],
)
def test_numbers_in_names_that_are_sorted_as_text_are_noted(names, note):
  found = classes.text_order(names)
  assert len(found) == bool(note)
  assert all(each.endswith(note) for each in found)
