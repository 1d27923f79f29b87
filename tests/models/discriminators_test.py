import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import discriminators
from selfboottok_jax.objectives import adversarial
from selfboottok_jax.training import sharding

KERNEL = jax.random.normal(jax.random.key(0), (3, 4, 6))
BATCH = 2 + 3 * jax.random.normal(jax.random.key(1), (8, 5, 4))


@pytest.fixture
def spectral():
  module = discriminators.SpectralNorm()
  return module, module.init(jax.random.key(2), KERNEL)


def _forward(module, variables, x):
  y, updated = module.apply(
    variables, x, train=True, mutable=[discriminators.NORMS]
  )
  return y, {**variables, **updated}


def test_spectral_norm_converges_to_the_largest_singular_value(spectral):
  module, variables = spectral
  largest = np.linalg.norm(KERNEL.reshape(12, 6), ord=2)
  scales = []
  for _ in range(100):
    kernel, variables = _forward(module, variables, KERNEL)
    scales.append(float(KERNEL[0, 0, 0] / kernel[0, 0, 0]))
  assert abs(scales[0] - largest) > 1e-3 * largest
  np.testing.assert_allclose(scales[-1], largest, rtol=1e-5)
  # From below, and never away from it.
  assert np.all(np.diff(scales) > -1e-5)


def test_one_step_of_the_power_iteration_by_hand(spectral):
  module, variables = spectral
  matrix = np.asarray(KERNEL.reshape(12, 6))
  u = np.asarray(variables[discriminators.NORMS]['u'])
  v = matrix @ u
  v /= np.linalg.norm(v)
  u = v @ matrix
  sigma = np.linalg.norm(u)
  kernel, variables = _forward(module, variables, KERNEL)
  norms = variables[discriminators.NORMS]
  np.testing.assert_allclose(norms['v'], v, rtol=1e-5)
  np.testing.assert_allclose(norms['u'], u / sigma, rtol=1e-5)
  np.testing.assert_allclose(kernel, KERNEL / sigma, rtol=1e-5)


def test_singular_vectors_are_constants_for_the_gradient(spectral):
  module, variables = spectral
  weights = jax.random.normal(jax.random.key(3), KERNEL.shape)

  def loss(kernel):
    return jnp.sum(weights * _forward(module, variables, kernel)[0])

  _, after = _forward(module, variables, KERNEL)
  norms = after[discriminators.NORMS]
  outer = jnp.outer(norms['v'], norms['u']).reshape(KERNEL.shape)

  def constant(kernel):
    return jnp.sum(weights * kernel / jnp.sum(kernel * outer))

  np.testing.assert_allclose(
    jax.grad(loss)(KERNEL), jax.grad(constant)(KERNEL), rtol=1e-4, atol=1e-6
  )


def test_nothing_is_remembered_outside_of_training(spectral):
  module, variables = spectral
  first = module.apply(variables, KERNEL)
  np.testing.assert_array_equal(first, module.apply(variables, KERNEL))
  norm = discriminators.BatchNorm()
  variables = norm.init(jax.random.key(0), BATCH)
  # Means of 0 and variances of 1, whatever was in the first batch.
  np.testing.assert_allclose(norm.apply(variables, BATCH), BATCH, rtol=1e-5)


def test_batch_norm_by_hand():
  module = discriminators.BatchNorm(momentum=0.25)
  variables = module.init(jax.random.key(0), BATCH, train=True)
  y, after = _forward(module, variables, BATCH)
  x = np.asarray(BATCH, np.float64).reshape(40, 4)
  expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
  np.testing.assert_allclose(y.reshape(40, 4), expected, atol=1e-5)
  norms = after[discriminators.NORMS]
  np.testing.assert_allclose(norms['mean'], 0.25 * x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    norms['variance'], 0.75 + 0.25 * x.var(0, ddof=1), rtol=1e-5
  )


def test_batch_norm_scales_and_shifts():
  module = discriminators.BatchNorm()
  variables = module.init(jax.random.key(0), BATCH)
  plain, _ = _forward(module, variables, BATCH)
  affine = {'scale': jnp.arange(4.0), 'bias': jnp.arange(4.0) - 7}
  y, _ = _forward(module, variables | {'params': affine}, BATCH)
  scale, bias = (np.asarray(affine[key]) for key in ('scale', 'bias'))
  expected = np.asarray(plain) * scale + bias
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_running_statistics_are_float32_whatever_computes():
  module = discriminators.BatchNorm(dtype='bfloat16')
  x = BATCH.astype(jnp.bfloat16)
  variables = module.init(jax.random.key(0), x)
  y, after = _forward(module, variables, x)
  assert y.dtype == jnp.bfloat16
  kinds = {leaf.dtype for leaf in jax.tree.leaves(after)}
  assert kinds == {jnp.dtype('float32')}


@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_statistics_are_of_the_global_batch(shape):
  """A sharded batch is normalised as a whole, not device by device."""
  module = discriminators.BatchNorm()
  # Images differ in mean and spread, so that parts tell another story.
  x = BATCH * jnp.arange(1.0, 9.0)[:, None, None]
  variables = module.init(jax.random.key(0), x)

  @jax.jit
  def step(x):
    y, after = _forward(module, variables, x)
    gradient = jax.grad(
      lambda x: jnp.sum(_forward(module, variables, x)[0] ** 3)
    )
    return y, after[discriminators.NORMS], gradient(x)

  whole = step(x)
  mesh = sharding.make_mesh(*shape)
  with jax.set_mesh(mesh):
    shared = step(jax.device_put(x, sharding.batch_sharding(mesh)))
  assert len(shared[0].sharding.device_set) == 8
  for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  alone, _ = _forward(module, variables, x[:1])
  assert np.max(np.abs(alone - whole[0][:1])) > 0.1


B, N, D = 4, 6, 8


@pytest.fixture(scope='module')
def activations():
  keys = jax.random.split(jax.random.key(0), 3)
  return [1 + 2 * jax.random.normal(key, (B, N, D)) for key in keys]


@pytest.fixture(scope='module')
def dino():
  return discriminators.DinoDiscriminator(kernel=3)


@pytest.fixture(scope='module')
def variables(dino, activations):
  return jax.jit(dino.init)(jax.random.key(1), activations)


def test_a_logit_for_each_depth_and_patch(dino, variables, activations):
  logits, _ = _forward(dino, variables, activations)
  assert logits.shape == (B, 3 * N)
  assert logits.dtype == jnp.float32
  # Heads one after the other: each reads its own depth.
  others = [activations[0], -activations[1], activations[2]]
  changed = np.any(_forward(dino, variables, others)[0] != logits, axis=0)
  np.testing.assert_array_equal(changed, np.repeat([False, True, False], N))


def test_paper_size_of_dino():
  dino = discriminators.DinoDiscriminator()
  shapes = [jax.ShapeDtypeStruct((1, 196, 384), jnp.float32)] * 5
  variables = jax.eval_shape(dino.init, jax.random.key(0), shapes)
  count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  assert count == pytest.approx(7.4e6, rel=0.01)


@pytest.mark.parametrize('kernel', [1, 3, 5])
def test_positions_are_a_ring(kernel, activations):
  dino = discriminators.DinoDiscriminator(kernel=kernel)
  variables = dino.init(jax.random.key(1), activations[:1])
  x = activations[0]
  logits = dino.apply(variables, [x])
  turned = dino.apply(variables, [jnp.roll(x, 2, axis=1)])
  np.testing.assert_allclose(turned, jnp.roll(logits, 2, axis=1), atol=1e-5)
  seen = jax.jacobian(lambda x: dino.apply(variables, [x])[0, 0])(x)[0]
  reached = np.flatnonzero(np.any(seen != 0, axis=-1))
  around = {i % N for i in range(-(kernel // 2), kernel // 2 + 1)}
  assert set(reached) == around


def test_kernels_have_unit_norm_once_seen_often(dino, variables, activations):
  step = jax.jit(lambda v: v | _forward(dino, v, activations)[1])
  for _ in range(100):
    variables = step(variables)
  conv = discriminators.SpectralConv(D, 3)
  head = variables['params']['head_0']['around']['conv']
  norms = variables[discriminators.NORMS]['head_0']['around']['conv']
  eye = jnp.eye(N * D).reshape(N * D, N, D)
  no_bias = head | {'bias': jnp.zeros(D)}
  kernel = conv.apply({'params': no_bias, discriminators.NORMS: norms}, eye)
  # The operator on the ring is bounded by the taps' sum, and is no zero.
  largest = np.linalg.norm(kernel.reshape(N * D, N * D), ord=2)
  assert 0.5 < largest <= np.sqrt(3) * 1.001
  matrix = head['kernel'].reshape(-1, D)
  sigma = norms['spectral']['v'] @ matrix @ norms['spectral']['u']
  np.testing.assert_allclose(sigma, np.linalg.norm(matrix, ord=2), rtol=1e-4)


def test_initial_logits_of_dino_are_of_size_one(dino, variables, activations):
  logits, _ = _forward(dino, variables, activations)
  assert 0.05 < jnp.std(logits) < 3


def test_each_training_forward_moves_every_statistic(
  dino, variables, activations
):
  _, after = _forward(dino, variables, activations)
  before = variables[discriminators.NORMS]
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), before, after[discriminators.NORMS]
  )
  for head in moved.values():
    # A single output has one unit vector.
    assert not head['logit']['spectral'].pop('u')
  assert all(jax.tree.leaves(moved))


def test_every_parameter_learns_to_tell_batches_apart(
  dino, variables, activations
):
  params, norms = variables['params'], variables[discriminators.NORMS]
  fake = [x * jnp.linspace(-1, 1, D)[None, None] for x in activations]

  @jax.jit
  def step(params, norms):
    def loss(params):
      now, logits = norms, []
      for seen in (activations, fake):
        judged, updated = _forward(
          dino, {'params': params, discriminators.NORMS: now}, seen
        )
        now = updated[discriminators.NORMS]
        logits.append(judged)
      return adversarial.hinge_discriminator(*logits), now

    (value, now), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    new = jax.tree.map(lambda p, g: p - g, params, gradient)
    return new, now, value, gradient

  first = None
  for _ in range(150):
    params, norms, value, gradient = step(params, norms)
    if first is None:
      first = value
      for head in gradient.values():
        for layer in ('embed', 'around'):
          # Batch norm takes it out again.
          bias = head[layer]['conv'].pop('bias')
          assert np.max(np.abs(bias)) < 1e-6
        # Half of the logits push up, half down.
        del head['logit']['bias']
      assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))
  assert value < 0.7 * first


def test_bfloat16_of_dino_follows_float32(dino, variables, activations):
  low = discriminators.DinoDiscriminator(kernel=3, dtype='bfloat16')
  exact, _ = _forward(dino, variables, activations)
  rough, after = _forward(low, variables, activations)
  assert rough.dtype == jnp.float32
  assert jnp.any(rough != exact)
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype('float32')}


def test_an_even_kernel_has_no_middle(activations):
  dino = discriminators.DinoDiscriminator(kernel=4)
  with pytest.raises(errors.ConfigError, match='kernel=4; wanted an odd'):
    dino.init(jax.random.key(0), activations)


@pytest.fixture(scope='module')
def images():
  return jax.random.uniform(jax.random.key(0), (8, 16, 16, 3), minval=-1)


@pytest.fixture(scope='module')
def stylegan():
  return discriminators.StyleGanDiscriminator(width=8, max_width=16)


@pytest.fixture(scope='module')
def params(stylegan, images):
  return jax.jit(stylegan.init)(jax.random.key(1), images)['params']


@functools.partial(jax.jit, static_argnums=0)
def apply(stylegan, params, images):
  return stylegan.apply({'params': params}, images)


def test_shapes_and_names(stylegan, params, images):
  logits = apply(stylegan, params, images)
  assert logits.shape == (8,)
  assert logits.dtype == jnp.float32
  assert set(params) == {
    *('from_rgb', 'block_0', 'block_1', 'mix', 'hidden', 'logit')
  }
  # Channels double up to the bound; the deviation adds one.
  assert params['block_0']['second']['kernel'].shape == (3, 3, 8, 16)
  assert params['block_1']['second']['kernel'].shape == (3, 3, 16, 16)
  assert params['mix']['kernel'].shape == (3, 3, 17, 16)


def test_no_state_beside_parameters(stylegan, images):
  shapes = jax.eval_shape(stylegan.init, jax.random.key(0), images)
  assert set(shapes) == {'params'}


def test_paper_size_of_stylegan():
  stylegan = discriminators.StyleGanDiscriminator(width=64, dtype='bfloat16')
  inputs = jax.ShapeDtypeStruct((4, 256, 256, 3), jnp.float32)
  logits, variables = jax.eval_shape(
    stylegan.init_with_output, jax.random.key(0), inputs
  )
  assert logits.shape == (4,)
  assert logits.dtype == jnp.float32
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}
  assert 10e6 < sum(leaf.size for leaf in leaves) < 40e6


def test_initial_logits_of_stylegan_are_of_size_one():
  """He's weights keep activations alive through four blocks."""
  stylegan = discriminators.StyleGanDiscriminator(
    width=8, max_width=8, min_resolution=2
  )
  images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3), minval=-1)
  logits, _ = jax.jit(stylegan.init_with_output)(jax.random.key(1), images)
  assert 1e-3 < jnp.mean(jnp.abs(logits)) < 10


def test_bfloat16_of_stylegan_follows_float32(stylegan, params, images):
  low = discriminators.StyleGanDiscriminator(
    width=8, max_width=16, dtype='bfloat16'
  )
  exact, rough = apply(stylegan, params, images), apply(low, params, images)
  assert rough.dtype == jnp.float32
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert jnp.any(rough != exact)


def test_every_parameter_learns_to_tell_images_apart(stylegan, params, images):
  real, fake = images, jnp.roll(images, 1, axis=1) * 0.5

  @jax.jit
  def step(params):
    def loss(params):
      return adversarial.hinge_discriminator(
        apply(stylegan, params, real), apply(stylegan, params, fake)
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


def test_groups_see_each_other_and_no_one_else(stylegan, params, images):
  base = apply(stylegan, params, images)
  changed = apply(stylegan, params, images.at[0].set(0.9))
  np.testing.assert_array_equal(changed[4:], base[4:])
  assert jnp.all(changed[:4] != base[:4])


def test_deviation_by_hand():
  x = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
  actual = discriminators.minibatch_deviation(x, 2)
  expected = np.std(np.asarray(x).reshape(2, 2, -1), axis=1).mean(axis=-1)
  np.testing.assert_allclose(
    actual[:, 1, 1, 0], np.repeat(expected, 2), rtol=1e-5
  )


def test_lone_image_has_a_finite_gradient(stylegan, params, images):
  gradient = jax.jit(jax.grad(lambda x: apply(stylegan, params, x)[0]))(
    images[:1]
  )
  assert jnp.all(jnp.isfinite(gradient))
  assert jnp.any(gradient != 0)


def test_blur_keeps_constants_and_removes_checkers():
  inside = (slice(None), slice(2, -2), slice(2, -2))
  constant = discriminators.blur(jnp.ones((1, 8, 8, 2)), padding=1, stride=1)
  np.testing.assert_allclose(constant[inside], 1.0)
  rows, columns = jnp.meshgrid(jnp.arange(8), jnp.arange(8))
  checkers = jnp.where((rows + columns) % 2, 1.0, -1.0)[None, :, :, None]
  np.testing.assert_allclose(
    discriminators.blur(checkers, padding=1)[inside], 0.0, atol=1e-6
  )


@pytest.mark.parametrize(('padding', 'stride'), [(1, 2), (2, 1), (1, 1)])
def test_blur_is_the_convolution_it_says(padding, stride):
  x = jax.random.normal(jax.random.key(0), (2, 6, 8, 1))
  kernel = np.outer(discriminators.BLUR, discriminators.BLUR)
  expected = jax.lax.conv_general_dilated(
    x,
    jnp.asarray(kernel, jnp.float32)[:, :, None, None],
    window_strides=(stride, stride),
    padding=[(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  actual = discriminators.blur(x, padding=padding, stride=stride)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('size', [(24, 24), (16, 32), (12, 12)])
def test_sides_need_not_be_powers_of_two(stylegan, size):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  logits, _ = jax.eval_shape(
    stylegan.init_with_output, jax.random.key(0), images
  )
  assert logits.shape == (2,)


@pytest.mark.parametrize(
  ('size', 'message'),
  [((18, 18), 'multiples of 4'), ((2, 8), 'at least 4')],
)
def test_sides_that_do_not_halve(stylegan, size, message):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  with pytest.raises(errors.ConfigError, match=message):
    jax.eval_shape(stylegan.init, jax.random.key(0), images)


@pytest.mark.parametrize(
  ('module', 'message'),
  [
    (
      discriminators.DinoDiscriminator(kernel=-1),
      r'discriminator\.dino\.kernel=-1; wanted 1 or more',
    ),
    (
      discriminators.StyleGanDiscriminator(width=0),
      r'discriminator\.stylegan\.width=0; wanted 1 or more',
    ),
    (
      discriminators.StyleGanDiscriminator(max_width=0),
      r'discriminator\.stylegan\.max_width=0; wanted 1 or more',
    ),
    (
      discriminators.StyleGanDiscriminator(min_resolution=0),
      r'discriminator\.stylegan\.min_resolution=0; wanted 1 or more',
    ),
    (
      discriminators.StyleGanDiscriminator(group=0),
      r'discriminator\.stylegan\.group=0; wanted 1 or more',
    ),
    (
      discriminators.StyleGanDiscriminator(dtype='float99'),
      r"model\.dtype='float99'; wanted one of float32, bfloat16",
    ),
  ],
)
def test_a_field_out_of_range_is_named(module, message):
  with pytest.raises(errors.ConfigError, match=message):
    module.check()
