import json

import numpy as np
import pytest

from selfboottok_jax import errors, sizes


@pytest.mark.parametrize(
  ('given', 'wanted'),
  [
    (64, 64),
    (np.int64(64), 64),
    ((64, 64), 64),
    ([64], 64),
    ((96, 64), (96, 64)),
    (json.loads(json.dumps((64, 96))), (64, 96)),
  ],
)
def test_every_form_becomes_one(given, wanted):
  found = sizes.canonical(given)
  assert found == wanted
  # A square stays the number that older runs hold, to the type.
  assert type(found) is type(wanted)
  assert sizes.canonical(found) == found


@pytest.mark.parametrize(
  'given', [0, -1, True, 64.0, '64', None, (), (1, 2, 3), (64, 0), (64, True)]
)
def test_what_is_no_size_is_refused(given):
  with pytest.raises(errors.ConfigError, match=r'data\.image_size=.*1 or more'):
    sizes.canonical(given)
  with pytest.raises(errors.ConfigError, match='side=.*height, width'):
    sizes.canonical(given, 'side')


def test_pairs_are_height_then_width():
  assert sizes.pair(8) == (8, 8)
  assert sizes.pair((8, 6)) == (8, 6)
  assert sizes.grid((96, 64), 16) == (6, 4)
  assert sizes.describe(32) == '32x32'
  assert sizes.describe((96, 64)) == '96x64'


@pytest.mark.parametrize('size', [64, (96, 64), (1, 30_000)])
def test_a_flag_reads_what_errors_propose(size):
  assert sizes.parse(sizes.as_flag(size)) == size
  assert sizes.parse(sizes.describe(size)) == sizes.pair(size)
  assert sizes.parse(str(size)) == size


@pytest.mark.parametrize('text', ['big', '64.0', '6 4', 'x64y'])
def test_other_texts_are_left_to_the_check(text):
  assert sizes.parse(text) == text


def test_the_type_of_a_field_holds_what_sizes_are_made_of():
  for size in (64, (96, 64), [96, 64]):
    assert isinstance(size, sizes.AnySize)
  for other in ('64', 64.0, None):
    assert not isinstance(other, sizes.AnySize)
