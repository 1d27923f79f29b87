import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import lpips, mobilenet, weight_reader
from tests.pretrained import weights

WANTED = {'a.weight': (2, 3), 'a.bias': (3,), 'b': (4,)}


def _arrays():
  return {k: np.ones(s, np.float32) for k, s in WANTED.items()}


def _check(arrays, unused=()):
  reader = weight_reader.Reader(arrays)
  for name, shape in WANTED.items():
    reader.take(name, *shape)
  reader.check('toy', 'some.npz', unused)


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
    weights.random_lpips(weights.wanted(lpips.assemble, lpips.squeeze())),
  )
  b = weights.save(
    tmp_path / 'b.npz',
    weights.random_mobilenet(weights.wanted(mobilenet.assemble)),
  )
  with pytest.raises(errors.WeightsError, match='holds another network'):
    pretrained.load_network(f'mobilenet_v2:{a}')
  with pytest.raises(errors.WeightsError, match='holds another network'):
    pretrained.load_perceptual(f'lpips_squeeze:{b}')


def test_layers_of_torch_become_ours():
  rng = np.random.default_rng(0)
  arrays = {
    'fc.weight': rng.integers(9, size=(5, 3)),
    'fc.bias': rng.integers(9, size=5),
    'ln.weight': rng.integers(9, size=5),
    'ln.bias': rng.integers(9, size=5),
    'conv.weight': rng.integers(9, size=(5, 3, 2, 2)),
    'conv.bias': rng.integers(9, size=5),
  }
  reader = weight_reader.Reader(arrays)
  layer = reader.linear('fc', 3, 5)
  x = rng.integers(9, size=3)
  np.testing.assert_array_equal(
    x @ layer['kernel'] + layer['bias'],
    arrays['fc.weight'] @ x + arrays['fc.bias'],
  )
  norm = reader.norm('ln', 5)
  np.testing.assert_array_equal(norm['scale'], arrays['ln.weight'])
  np.testing.assert_array_equal(norm['bias'], arrays['ln.bias'])
  conv = reader.conv('conv', 3, 5, 2, 2)
  assert conv['kernel'].shape == (2, 2, 3, 5)
  assert conv['kernel'][1, 0, 2, 4] == arrays['conv.weight'][4, 2, 1, 0]
  embed = reader.patch_embed('conv', 3, 5, 2)
  patches = layers.patchify(
    jnp.asarray(rng.integers(9, size=(1, 4, 4, 3)) * 1.0), 2
  )
  np.testing.assert_array_equal(
    patches @ embed['kernel'],
    np.einsum(
      'bnpqc,ocpq->bno', patches.reshape(1, 4, 2, 2, 3), arrays['conv.weight']
    ),
  )
  reader.check('toy', 'test')
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(conv))


def test_zeros_stand_in_for_what_does_not_fit():
  reader = weight_reader.Reader({'a.weight': np.ones((3, 2))})
  assert not reader.take('a.weight', 2, 3).any()
  assert reader.take('b', 4).shape == (4,)
  assert reader.wanted == {'a.weight': (2, 3), 'b': (4,)}


def test_gradients_reach_the_names_of_the_file():
  def loss(arrays):
    layer = weight_reader.Reader(arrays).linear('fc', 2, 1)
    blocks = weight_reader.stack([layer, {**layer, 'bias': np.ones(1)}])
    return blocks['kernel'].sum() + 3 * blocks['bias'].sum()

  arrays = {'fc.weight': jnp.ones((1, 2)), 'fc.bias': jnp.ones(1)}
  gradient = jax.jit(jax.grad(loss))(arrays)
  np.testing.assert_array_equal(gradient['fc.weight'], [[2, 2]])
  np.testing.assert_array_equal(gradient['fc.bias'], [3])


def test_a_stack_of_numpy_stays_numpy():
  stacked = weight_reader.stack([{'a': np.ones(2)}, {'a': np.zeros(2)}])
  assert isinstance(stacked['a'], np.ndarray)
  assert stacked['a'].shape == (2, 2)


def test_arrays_without_sizes():
  arrays = {'fc.weight': np.zeros((5, 3))}
  assert weight_reader.shape_of(arrays, 'fc.weight', 2) == (5, 3)
  with pytest.raises(KeyError, match='no fc.bias'):
    weight_reader.shape_of(arrays, 'fc.bias', 1)
  with pytest.raises(ValueError, match=r'fc.weight is \(5, 3\)'):
    weight_reader.shape_of(arrays, 'fc.weight', 4)
