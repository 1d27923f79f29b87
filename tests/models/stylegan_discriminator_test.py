import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import stylegan_discriminator
from selfboottok_jax.objectives import adversarial


@pytest.fixture(scope='module')
def images():
  return jax.random.uniform(jax.random.key(0), (8, 16, 16, 3), minval=-1)


@pytest.fixture(scope='module')
def module():
  return stylegan_discriminator.StyleGanDiscriminator(width=8, max_width=16)


@pytest.fixture(scope='module')
def params(module, images):
  return jax.jit(module.init)(jax.random.key(1), images)['params']


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, images):
  return module.apply({'params': params}, images)


def test_shapes_and_names(module, params, images):
  logits = apply(module, params, images)
  assert logits.shape == (8,)
  assert logits.dtype == jnp.float32
  assert set(params) == {
    *('from_rgb', 'block_0', 'block_1', 'mix', 'hidden', 'logit')
  }
  # Channels double up to the bound; the deviation adds one.
  assert params['block_0']['second']['kernel'].shape == (3, 3, 8, 16)
  assert params['block_1']['second']['kernel'].shape == (3, 3, 16, 16)
  assert params['mix']['kernel'].shape == (3, 3, 17, 16)


def test_no_state_beside_parameters(module, images):
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  assert set(shapes) == {'params'}


def test_paper_size():
  module = stylegan_discriminator.StyleGanDiscriminator(
    width=64, dtype='bfloat16'
  )
  inputs = jax.ShapeDtypeStruct((4, 256, 256, 3), jnp.float32)
  logits, variables = jax.eval_shape(
    module.init_with_output, jax.random.key(0), inputs
  )
  assert logits.shape == (4,)
  assert logits.dtype == jnp.float32
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}
  assert 10e6 < sum(leaf.size for leaf in leaves) < 40e6


def test_initial_logits_are_of_size_one():
  """He's weights keep activations alive through four blocks."""
  module = stylegan_discriminator.StyleGanDiscriminator(
    width=8, max_width=8, min_resolution=2
  )
  images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3), minval=-1)
  logits, _ = jax.jit(module.init_with_output)(jax.random.key(1), images)
  assert 1e-3 < jnp.mean(jnp.abs(logits)) < 10


def test_bfloat16_follows_float32(module, params, images):
  low = stylegan_discriminator.StyleGanDiscriminator(
    width=8, max_width=16, dtype='bfloat16'
  )
  exact, rough = apply(module, params, images), apply(low, params, images)
  assert rough.dtype == jnp.float32
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert jnp.any(rough != exact)


def test_every_parameter_learns_to_tell_images_apart(module, params, images):
  real, fake = images, jnp.roll(images, 1, axis=1) * 0.5

  @jax.jit
  def step(params):
    def loss(params):
      return adversarial.hinge_discriminator(
        apply(module, params, real), apply(module, params, fake)
      )

    value, gradient = jax.value_and_grad(loss)(params)
    new = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient)
    return new, value, gradient

  first = None
  for _ in range(60):
    params, value, gradient = step(params)
    if first is None:
      first = value
      # Differences of hinge gradients can cancel in the last bias alone.
      del gradient['logit']['bias']
      assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))
  assert value < 0.5 * first


def test_groups_see_each_other_and_no_one_else(module, params, images):
  base = apply(module, params, images)
  changed = apply(module, params, images.at[0].set(0.9))
  np.testing.assert_array_equal(changed[4:], base[4:])
  assert jnp.all(changed[:4] != base[:4])


def test_deviation_by_hand():
  x = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
  actual = stylegan_discriminator.minibatch_deviation(x, 2)
  expected = np.std(np.asarray(x).reshape(2, 2, -1), axis=1).mean(axis=-1)
  np.testing.assert_allclose(
    actual[:, 1, 1, 0], np.repeat(expected, 2), rtol=1e-5
  )


def test_lone_image_has_a_finite_gradient(module, params, images):
  gradient = jax.jit(jax.grad(lambda x: apply(module, params, x)[0]))(
    images[:1]
  )
  assert jnp.all(jnp.isfinite(gradient))
  assert jnp.any(gradient != 0)


def test_blur_keeps_constants_and_removes_checkers():
  inside = (slice(None), slice(2, -2), slice(2, -2))
  constant = stylegan_discriminator.blur(
    jnp.ones((1, 8, 8, 2)), padding=1, stride=1
  )
  np.testing.assert_allclose(constant[inside], 1.0)
  rows, columns = jnp.meshgrid(jnp.arange(8), jnp.arange(8))
  checkers = jnp.where((rows + columns) % 2, 1.0, -1.0)[None, :, :, None]
  np.testing.assert_allclose(
    stylegan_discriminator.blur(checkers, padding=1)[inside], 0.0, atol=1e-6
  )


@pytest.mark.parametrize(('padding', 'stride'), [(1, 2), (2, 1), (1, 1)])
def test_blur_is_the_convolution_it_says(padding, stride):
  x = jax.random.normal(jax.random.key(0), (2, 6, 8, 1))
  kernel = np.outer(stylegan_discriminator.BLUR, stylegan_discriminator.BLUR)
  expected = jax.lax.conv_general_dilated(
    x,
    jnp.asarray(kernel, jnp.float32)[:, :, None, None],
    window_strides=(stride, stride),
    padding=[(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  actual = stylegan_discriminator.blur(x, padding=padding, stride=stride)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('size', [(24, 24), (16, 32), (12, 12)])
def test_sides_need_not_be_powers_of_two(module, size):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
  assert logits.shape == (2,)


@pytest.mark.parametrize(
  ('size', 'message'),
  [((18, 18), 'multiples of 4'), ((2, 8), 'at least 4')],
)
def test_sides_that_do_not_halve(module, size, message):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  with pytest.raises(errors.ConfigError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), images)
