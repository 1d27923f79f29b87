import pickle

import numpy as np
import pytest

from selfboottok_jax.data import packed_names

NAMES = ['a/1.jpg', '', 'ø.png', 'b\udcff', 'a/1.jpg']


def test_names_come_back_as_they_were():
  packed = packed_names.PackedNames(NAMES)
  assert list(packed) == NAMES
  assert len(packed) == 5
  assert packed[-2] == NAMES[-2]
  assert list(packed[1:4]) == NAMES[1:4]
  assert list(packed.take(np.array([4, 2]))) == [NAMES[4], NAMES[2]]
  assert list(packed_names.PackedNames([])) == []


@pytest.mark.parametrize('index', [5, -6])
def test_no_name_is_beyond_the_last(index):
  with pytest.raises(IndexError):
    packed_names.PackedNames(NAMES)[index]


def test_they_take_little_more_than_their_text():
  packed = packed_names.PackedNames(f'{i:020}' for i in range(1000))
  copy = pickle.dumps(packed)
  assert len(copy) < 1000 * 28 + 500
  assert list(pickle.loads(copy)) == list(packed)
