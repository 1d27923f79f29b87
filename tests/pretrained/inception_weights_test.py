import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import inception_layers, inception_weights

LAYER = 'Mixed_6b.branch7x7_2'


@pytest.fixture(scope='module')
def arrays():
  """A state dict; numbers where a test looks at them, else ones."""
  arrays = {
    name: np.broadcast_to(np.float32(1), shape)
    for name, shape in inception_weights.shapes().items()
  }
  rng = np.random.default_rng(0)
  for name in [*arrays]:
    if name.startswith((f'{LAYER}.', 'fc.')):
      array = rng.uniform(0.5, 2, arrays[name].shape)
      arrays[name] = array.astype(np.float32)
  return arrays


def test_every_array_of_the_file_is_listed():
  shapes = inception_weights.shapes()
  assert len(shapes) == 472
  assert shapes[f'{LAYER}.conv.weight'] == (128, 128, 1, 7)
  assert shapes['fc.weight'] == (1008, 2048)


def test_batch_norm_is_folded_in(arrays):
  params = inception_weights.read(arrays, 'test')
  assert params.keys() == {*inception_layers.kernels(), 'fc'}
  rng = np.random.default_rng(1)
  x = rng.standard_normal((1, 3, 9, 128)).astype(np.float32)

  def convolve(kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  def part(name):
    return arrays[f'{LAYER}.bn.{name}'].reshape(1, 1, 1, -1)

  plain = convolve(arrays[f'{LAYER}.conv.weight'].transpose(2, 3, 1, 0))
  deviation = np.sqrt(part('running_var') + 1e-3)
  normed = (plain - part('running_mean')) / deviation
  expected = normed * part('weight') + part('bias')
  layer = params[LAYER]
  actual = convolve(layer['kernel']) + layer['bias'].reshape(1, 1, 1, -1)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  np.testing.assert_array_equal(
    params['fc']['kernel'][3, 5], arrays['fc.weight'][5, 3]
  )


def test_what_serves_training_alone_is_left_alone(arrays):
  more = {
    f'{LAYER}.bn.num_batches_tracked': np.array(7),
    'AuxLogits.conv0.conv.weight': np.zeros((128, 768, 1, 1)),
  }
  inception_weights.read(arrays | more, 'test')


def test_all_that_does_not_fit_is_in_one_message(arrays):
  wrong = dict(arrays)
  del wrong['fc.bias'], wrong[f'{LAYER}.bn.running_var']
  wrong['fc.weight'] = np.zeros((1000, 2048))
  wrong['head.weight'] = np.zeros(3)
  wrong['Conv2d_1a_3x3.bn.bias'] = np.full(32, np.nan)
  with pytest.raises(errors.WeightsError) as error:
    inception_weights.read(wrong, 'a.pth')
  message = str(error.value)
  for part in (
    'a.pth does not fit inception',
    f'2 missing: {LAYER}.bn.running_var; fc.bias',
    '1 unexpected: head.weight',
    'fc.weight is (1000, 2048), wanted (1008, 2048)',
    '1 not finite numbers: Conv2d_1a_3x3.bn.bias',
  ):
    assert part in message
  assert '\n' not in message


def test_another_network_is_refused():
  with pytest.raises(errors.WeightsError, match='holds another network'):
    inception_weights.read({'features.0.weight': np.zeros(3)}, 'vgg.pth')


def test_the_published_count_of_parameters():
  # Folded, a batch norm is one bias.
  kept = [
    shape
    for name, shape in inception_weights.shapes().items()
    if name.endswith(('conv.weight', 'bias', 'fc.weight'))
  ]
  count = sum(math.prod(shape) for shape in kept)
  assert inception_weights.PUBLISHED.millions == round(count / 1e6, 1)
