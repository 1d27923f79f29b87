import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import contract, inception
from tests.pretrained import weights

# Rows of each map, and its channels.
MAPS = {
  'Conv2d_1a_3x3': (149, 32),
  'Conv2d_2a_3x3': (147, 32),
  'Conv2d_2b_3x3': (147, 64),
  'MaxPool_1': (73, 64),
  'Conv2d_3b_1x1': (73, 80),
  'Conv2d_4a_3x3': (71, 192),
  'MaxPool_2': (35, 192),
  'Mixed_5b': (35, 256),
  'Mixed_5c': (35, 288),
  'Mixed_5d': (35, 288),
  'Mixed_6a': (17, 768),
  'Mixed_6b': (17, 768),
  'Mixed_6c': (17, 768),
  'Mixed_6d': (17, 768),
  'Mixed_6e': (17, 768),
  'Mixed_7a': (8, 1280),
  'Mixed_7b': (8, 2048),
  'Mixed_7c': (8, 2048),
}


def _abstract():
  """Parameters without numbers, and an image."""
  params = {
    name: {
      'kernel': jax.ShapeDtypeStruct(shape, jnp.float32),
      'bias': jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
    }
    for name, shape in inception.kernels().items()
  }
  return params, jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)


def _run_all(params, image):
  return dict(inception.run_all(params, image))


def test_the_table_of_kernels():
  kernels = inception.kernels()
  assert len(kernels) == 94
  assert kernels['Mixed_5c.branch_pool'] == (1, 1, 256, 64)
  assert kernels['Mixed_6b.branch7x7dbl_2'] == (7, 1, 128, 128)
  assert kernels['Mixed_7a.branch7x7x3_4'] == (3, 3, 192, 192)
  # Side by side: both read what stands before them.
  for name in ('3x3_2a', '3x3_2b', '3x3dbl_3a', '3x3dbl_3b'):
    assert kernels[f'Mixed_7c.branch{name}'][2:] == (384, 384)


def test_every_map_has_its_size():
  maps = jax.eval_shape(_run_all, *_abstract())
  assert {name: (x.shape[1], x.shape[3]) for name, x in maps.items()} == MAPS


def test_no_product_is_of_reduced_precision():
  jaxpr = jax.make_jaxpr(_run_all)(*_abstract())
  found = [
    equation.params['precision']
    for equation in jaxpr.eqns
    if equation.primitive.name == 'conv_general_dilated'
  ]
  assert len(found) == 94
  assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize('name', ['average', 'maximum'])
def test_a_padded_pool_adds_no_zeros(name):
  # Zeros would pull the border of the average in, and a maximum of negative
  # numbers up.
  x = jnp.full((1, 5, 6, 2), -3.0)
  np.testing.assert_allclose(inception.POOLS[name](x), x, rtol=1e-6)


def test_the_last_block_alone_takes_the_maximum():
  def pools(stage):
    return {
      step
      for branch in inception.STAGES[stage]
      for step in branch
      if isinstance(step, str)
    }

  with_maximum = [s for s in inception.STAGES if 'maximum' in pools(s)]
  assert with_maximum == ['Mixed_7c']
  assert pools('Mixed_7b') == pools('Mixed_6e') == {'average'}


LAYER = 'Mixed_6b.branch7x7_2'


@pytest.fixture(scope='module')
def arrays():
  """A state dict; numbers where a test looks at them, else ones."""
  arrays = {
    name: np.broadcast_to(np.float32(1), shape)
    for name, shape in weights.wanted(inception.assemble).items()
  }
  rng = np.random.default_rng(0)
  for name in [*arrays]:
    if name.startswith((f'{LAYER}.', 'fc.')):
      array = rng.uniform(0.5, 2, arrays[name].shape)
      arrays[name] = array.astype(np.float32)
  return arrays


def test_every_array_of_the_file_is_listed():
  shapes = weights.wanted(inception.assemble)
  assert len(shapes) == 472
  assert shapes[f'{LAYER}.conv.weight'] == (128, 128, 1, 7)
  assert shapes['fc.weight'] == (1008, 2048)


def test_batch_norm_is_folded_in(arrays):
  params = inception.Inception().read(arrays, 'test')
  assert params.keys() == {*inception.kernels(), 'fc'}
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
  inception.Inception().read(arrays | more, 'test')


def test_all_that_does_not_fit_is_in_one_message(arrays):
  wrong = dict(arrays)
  del wrong['fc.bias'], wrong[f'{LAYER}.bn.running_var']
  wrong['fc.weight'] = np.zeros((1000, 2048))
  wrong['head.weight'] = np.zeros(3)
  wrong['Conv2d_1a_3x3.bn.bias'] = np.full(32, np.nan)
  with pytest.raises(errors.WeightsError) as error:
    inception.Inception().read(wrong, 'a.pth')
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
    inception.Inception().read({'features.0.weight': np.zeros(3)}, 'vgg.pth')


def test_the_published_count_of_parameters():
  # Folded, a batch norm is one bias.
  kept = [
    shape
    for name, shape in weights.wanted(inception.assemble).items()
    if name.endswith(('conv.weight', 'bias', 'fc.weight'))
  ]
  count = sum(math.prod(shape) for shape in kept)
  assert inception.PUBLISHED.millions == round(count / 1e6, 1)


def _images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(-1, 1, (*shape, 3)), jnp.float32)


@pytest.fixture(scope='module')
def network():
  return inception.Inception()


@pytest.fixture(scope='module')
def params(network):
  return network.init(jax.random.key(0))


def test_keeps_the_contracts(network):
  assert isinstance(network, contract.FeatureNetwork)
  assert isinstance(network, contract.Weighted)
  assert network.published is inception.PUBLISHED
  assert network.grid(64) == network.grid(256) == (8, 8)


@pytest.mark.slow
def test_features_of_any_image(network, params):
  features = jax.jit(network.__call__)(params, _images(2, 20, 31))
  assert features.patches.shape == (2, 64, network.dim)
  assert features.cls.shape == (2, 2048)
  np.testing.assert_allclose(
    features.cls, features.patches.mean(axis=1), rtol=1e-5, atol=1e-6
  )
  one, other = np.asarray(features.cls)
  assert np.abs(one - other).max() > 1e-2
  assert 0.01 < one.mean() < 100


def test_scores_read_the_classifier_without_and_with_its_bias(network, params):
  bias = np.linspace(-1, 1, 1008, dtype=np.float32)
  params = params | {'fc': params['fc'] | {'bias': bias}}
  measured = jax.jit(network.measure)(params, _images(1, 40, 40))
  assert {w: x.shape[1] for w, x in measured.pooled.items()} == {
    w: w for w in (64, 192, 768, 2048)
  }
  np.testing.assert_allclose(
    measured.logits - measured.logits_unbiased, bias[None], atol=1e-5
  )
  kernel = np.asarray(params['fc']['kernel'])
  np.testing.assert_allclose(
    measured.logits_unbiased,
    np.asarray(measured.pooled[2048]) @ kernel,
    rtol=1e-4,
    atol=1e-5,
  )
  # Row, column, channel.
  assert measured.spatial.shape == (1, 2023)
  np.testing.assert_array_equal(
    measured.spatial[0, 7 * (3 * 17 + 5) : 7 * (3 * 17 + 5) + 7],
    measured.activations['Mixed_6d'][0, 3, 5, :7],
  )


def test_random_parameters_cost_nothing_but_shapes(network):
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  ones = {
    name: np.broadcast_to(np.float32(1), shape)
    for name, shape in weights.wanted(inception.assemble).items()
  }
  # As those of a file.
  read = network.read(ones, 'test')
  assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize(
  ('resize', 'lowest', 'highest'),
  [('tf1', -1, 127 / 128), ('half_pixel', -1, 1)],
)
def test_range_of_what_the_first_layer_sees(resize, lowest, highest):
  prepare = inception.Inception(resize).prepare
  for value, expected in ((-1, lowest), (1, highest)):
    flat = prepare(jnp.full((1, 7, 9, 3), value, jnp.float32))
    assert flat.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(flat, expected, atol=1e-6)


def test_an_image_of_its_own_size_is_not_resampled():
  image = _images(1, 299, 299)
  seen = inception.Inception('half_pixel').prepare(image)
  np.testing.assert_allclose(seen, image, atol=1e-6)
  seen = inception.Inception('tf1').prepare(image)
  np.testing.assert_allclose(seen * 128 + 128, (image + 1) * 127.5, atol=1e-4)


def test_only_half_pixel_centres_treat_both_ends_alike():
  image = _images(1, 50, 64)
  for resize, alike in (('half_pixel', True), ('tf1', False)):
    prepare = inception.Inception(resize).prepare
    turned = prepare(image[:, ::-1, ::-1])[:, ::-1, ::-1]
    assert np.allclose(turned, prepare(image), atol=1e-4) is alike


def test_nothing_is_rounded():
  prepare = inception.Inception().prepare
  slope = jax.grad(lambda x: prepare(x).sum())(jnp.zeros((1, 20, 20, 3)))
  assert float(slope.min()) > 0


def test_an_unknown_resize_lists_the_others():
  with pytest.raises(errors.UserError, match="'pil'.* tf1, half_pixel"):
    inception.Inception('pil')
