import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import roles


@pytest.mark.parametrize(
  ('name', 'wanted'),
  [
    ('train-00000-of-00002.parquet', 'train'),
    ('imagenet-val-000003.tar', 'val'),
    ('ILSVRC2012_img_train.tar', 'train'),
    ('Validation', 'val'),
    ('testing', 'test'),
    ('0000.parquet', ''),
    ('trains.tar', ''),
    ('constraint-00.tar', ''),
  ],
)
def test_a_word_of_a_name_tells_its_split(name, wanted):
  assert roles.role(name) == wanted


def plan(*names):
  return roles.plan({n: roles.role(n) for n in names}, 'SET', 'shards')


@pytest.mark.parametrize(
  ('names', 'train', 'val', 'is_held_out', 'origin'),
  [
    (('train-1', 'val'), ('train-1',), ('val',), False, 'val is val'),
    (('train-1', 'train-0'), ('train-1', 'train-0'), (), True, 'one image in'),
    (('b', 'a'), ('b', 'a'), (), True, 'no shards are named'),
    (('train', 'test-0', 'test-1'), ('train',), ('test-0', 'test-1'), False,
     '2 shards of test'),
    (('train', 'test', 'dev'), ('train',), ('dev',), False,
     'test of test are left out'),
    (('val',), (), ('val',), False, 'val is val'),
  ],
)  # fmt: skip
def test_parts_are_chosen_by_their_roles(
  names, train, val, is_held_out, origin
):
  found = plan(*names)
  assert found.parts == {'train': train, 'val': val}
  assert found.is_held_out == is_held_out
  assert origin in found.origin


def test_a_name_that_tells_nothing_beside_others_is_refused():
  with pytest.raises(errors.DataError, match='SET: the name extra tells no'):
    plan('train', 'extra')


def test_a_tenth_is_held_out_as_from_a_folder():
  names = [f'{i:05}.jpg' for i in range(2000)]
  held = roles.held_out(names)
  assert 150 < held.sum() < 250
  np.testing.assert_array_equal(
    held, [roles.in_validation(name) for name in names]
  )


def test_files_that_say_how_many_they_are_must_all_be_there():
  names = [f'data/train-{i:05}-of-00003.parquet' for i in range(3)]
  roles.check_numbers([*names, 'README', 'val-00000-of-00001'], 'SET', 'files')
  with pytest.raises(
    errors.DataError, match=r'SET lacks data/train-00001-of-00003\.parquet \(1 '
  ):
    roles.check_numbers([names[0], names[2]], 'SET', 'files')


@pytest.mark.parametrize(
  ('names', 'note'),
  [
    (['a-000.tar', 'a-001.tar', 'a-003.tar'], 'a-002.tar is not there'),
    ([f'{i}.tar' for i in range(8, 13) if i != 9], '9.tar is not there'),
    ([f'{i:03}.tar' for i in range(5, 12)], ''),
    ([f'{i:03}.tar' for i in range(98, 103) if i != 100], '100.tar is not'),
    (['20240101.tar', '20240301.tar'], ''),
    (['a-0001-of-0003.tar', 'a-0003-of-0003.tar'], ''),
    (['cats.tar', 'dogs.tar'], ''),
  ],
)
def test_files_that_are_missing_among_counted_ones_are_noted(names, note):
  found = roles.gaps(names, 'shards')
  assert len(found) == bool(note)
  assert all(each.startswith(note) for each in found)
