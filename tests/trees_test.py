import jax.numpy as jnp
import numpy as np

from selfboottok_jax import trees


def test_nested_keys_are_joined_and_parted_again():
  nested = {'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}
  assert trees.flatten(nested) == {'a.b': 1, 'a.c.d': 2, 'e': 3}
  assert trees.flatten(nested, '/') == {'a/b': 1, 'a/c/d': 2, 'e': 3}
  assert trees.unflatten(trees.flatten(nested, '/'), '/') == nested


def test_differences_are_listed_up_to_a_number():
  stored, given = {'a': 1, 'b': 2, 'c': 'x'}, {'a': 1, 'b': 3, 'd': None}
  assert trees.differences(stored, stored) == ''
  assert trees.differences(stored, given) == (
    "b: 2 there, 3 given, c: 'x' there, None given"
  )
  assert trees.differences(stored, given, 1) == 'b: 2 there, 3 given and 1 more'


def test_counts_numbers_of_arrays_and_shapes():
  assert trees.count({'a': np.ones((2, 3)), 'b': [jnp.ones(4)]}) == 10
  assert trees.count({}) == 0


def test_digest_is_of_all_numbers():
  one = {'a': np.arange(3.0), 'b': np.ones(2)}
  same = {'a': np.arange(3.0), 'b': np.ones(2)}
  assert trees.weights_hash(one) == trees.weights_hash(same)
  other = {**one, 'b': np.array([1.0, 1.0000001])}
  assert trees.weights_hash(one) != trees.weights_hash(other)
  assert len(trees.weights_hash(one)) == 8
  assert trees.weights_hash({}) == 'none'
