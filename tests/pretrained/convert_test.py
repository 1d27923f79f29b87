import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import (
  convert,
  lpips,
  lpips_backbones,
  mobilenet,
)
from tests.pretrained import weights

WANTED = {'a.weight': (2, 3), 'a.bias': (3,), 'b': (4,)}


def _arrays():
  return {k: np.ones(s, np.float32) for k, s in WANTED.items()}


def _check(arrays, unused=()):
  convert.check(arrays, WANTED, 'toy', 'some.npz', unused)


def _message(arrays, unused=()):
  with pytest.raises(errors.WeightsError) as caught:
    _check(arrays, unused)
  message = str(caught.value)
  assert '\n' not in message
  assert 'some.npz' in message
  assert 'toy' in message
  return message


def test_takes_what_is_wanted_and_leaves_the_unused():
  _check(_arrays())
  _check(_arrays() | {'head': np.zeros(9)}, ['head'])
  text = {'text.layers.0.w': np.zeros(2), 'text.norm': np.zeros(2)}
  _check(_arrays() | text, ['text.*', 'head'])
  message = _message(_arrays() | text | {'context': np.zeros(1)}, ['text.*'])
  assert '1 unexpected: context;' in message


def test_patterns_leave_what_is_wanted_alone():
  arrays = _arrays()
  arrays['a.bias'] = np.zeros(5)
  assert '1 mis-shaped: a.bias' in _message(arrays, ['*'])
  assert '2 missing' in _message({'b': np.ones(4)}, ['a.*'])


def test_one_line_lists_all_that_does_not_fit():
  arrays = _arrays() | {'c': np.zeros(1), 'a.weight': np.zeros((3, 2))}
  arrays['b'] = np.array([1, 2, np.nan, 4])
  del arrays['a.bias']
  message = _message(arrays)
  for part in (
    '1 missing: a.bias',
    '1 unexpected: c',
    'a.weight is (3, 2), wanted (2, 3)',
    '1 not finite numbers: b',
  ):
    assert part in message
  assert 'not finite numbers: b' in _message(
    _arrays() | {'b': np.array(['x'] * 4)}
  )


def test_networks_tell_their_files_apart(tmp_path):
  a = weights.save(
    tmp_path / 'a.npz',
    weights.random_lpips(lpips.shapes(lpips_backbones.squeeze())),
  )
  b = weights.save(
    tmp_path / 'b.npz', weights.random_mobilenet(mobilenet.shapes())
  )
  with pytest.raises(errors.WeightsError, match='holds another network'):
    pretrained.load_network(f'mobilenet_v2:{a}')
  with pytest.raises(errors.WeightsError, match='holds another network'):
    pretrained.load_perceptual(f'lpips_squeeze:{b}')


def _take(arrays):
  def take(name, *shape):
    assert arrays[name].shape == shape
    return arrays[name]

  return take


def test_layers_of_torch_become_ours():
  rng = np.random.default_rng(0)
  arrays = {
    'fc.weight': rng.normal(size=(5, 3)),
    'fc.bias': rng.normal(size=5),
    'ln.weight': rng.normal(size=5),
    'ln.bias': rng.normal(size=5),
  }
  layer = convert.linear(_take(arrays), 'fc', 3, 5)
  x = rng.normal(size=3)
  np.testing.assert_allclose(
    x @ layer['kernel'] + layer['bias'],
    arrays['fc.weight'] @ x + arrays['fc.bias'],
  )
  norm = convert.norm(_take(arrays), 'ln', 5)
  np.testing.assert_array_equal(norm['scale'], arrays['ln.weight'])
  np.testing.assert_array_equal(norm['bias'], arrays['ln.bias'])


def test_arrays_that_tell_no_sizes():
  arrays = {'fc.weight': np.zeros((5, 3))}
  assert convert.shape_of(arrays, 'fc.weight', 2) == (5, 3)
  with pytest.raises(KeyError, match='no fc.bias'):
    convert.shape_of(arrays, 'fc.bias', 1)
  with pytest.raises(ValueError, match=r'fc.weight is \(5, 3\)'):
    convert.shape_of(arrays, 'fc.weight', 4)
