import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import normalization
from selfboottok_jax.training import sharding

KERNEL = jax.random.normal(jax.random.key(0), (3, 4, 6))
BATCH = 2 + 3 * jax.random.normal(jax.random.key(1), (8, 5, 4))


@pytest.fixture
def spectral():
  module = normalization.SpectralNorm()
  return module, module.init(jax.random.key(2), KERNEL)


def _train(module, variables, x):
  y, updated = module.apply(
    variables, x, train=True, mutable=[normalization.NORMS]
  )
  return y, {**variables, **updated}


def test_spectral_norm_converges_to_the_largest_singular_value(spectral):
  module, variables = spectral
  largest = np.linalg.norm(KERNEL.reshape(12, 6), ord=2)
  scales = []
  for _ in range(100):
    kernel, variables = _train(module, variables, KERNEL)
    scales.append(float(KERNEL[0, 0, 0] / kernel[0, 0, 0]))
  assert abs(scales[0] - largest) > 1e-3 * largest
  np.testing.assert_allclose(scales[-1], largest, rtol=1e-5)
  # From below, and never away from it.
  assert np.all(np.diff(scales) > -1e-5)


def test_one_step_of_the_power_iteration_by_hand(spectral):
  module, variables = spectral
  matrix = np.asarray(KERNEL.reshape(12, 6))
  u = np.asarray(variables[normalization.NORMS]['u'])
  v = matrix @ u
  v /= np.linalg.norm(v)
  u = v @ matrix
  sigma = np.linalg.norm(u)
  kernel, variables = _train(module, variables, KERNEL)
  norms = variables[normalization.NORMS]
  np.testing.assert_allclose(norms['v'], v, rtol=1e-5)
  np.testing.assert_allclose(norms['u'], u / sigma, rtol=1e-5)
  np.testing.assert_allclose(kernel, KERNEL / sigma, rtol=1e-5)


def test_singular_vectors_are_constants_for_the_gradient(spectral):
  module, variables = spectral
  weights = jax.random.normal(jax.random.key(3), KERNEL.shape)

  def loss(kernel):
    return jnp.sum(weights * _train(module, variables, kernel)[0])

  _, after = _train(module, variables, KERNEL)
  norms = after[normalization.NORMS]
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
  norm = normalization.BatchNorm()
  variables = norm.init(jax.random.key(0), BATCH)
  # Means of 0 and variances of 1, whatever was in the first batch.
  np.testing.assert_allclose(norm.apply(variables, BATCH), BATCH, rtol=1e-5)


def test_batch_norm_by_hand():
  module = normalization.BatchNorm(momentum=0.25)
  variables = module.init(jax.random.key(0), BATCH, train=True)
  y, after = _train(module, variables, BATCH)
  x = np.asarray(BATCH, np.float64).reshape(40, 4)
  expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
  np.testing.assert_allclose(y.reshape(40, 4), expected, atol=1e-5)
  norms = after[normalization.NORMS]
  np.testing.assert_allclose(norms['mean'], 0.25 * x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(
    norms['variance'], 0.75 + 0.25 * x.var(0, ddof=1), rtol=1e-5
  )


def test_batch_norm_scales_and_shifts():
  module = normalization.BatchNorm()
  variables = module.init(jax.random.key(0), BATCH)
  plain, _ = _train(module, variables, BATCH)
  affine = {'scale': jnp.arange(4.0), 'bias': jnp.arange(4.0) - 7}
  y, _ = _train(module, variables | {'params': affine}, BATCH)
  scale, bias = (np.asarray(affine[key]) for key in ('scale', 'bias'))
  expected = np.asarray(plain) * scale + bias
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_running_statistics_are_float32_whatever_computes():
  module = normalization.BatchNorm(dtype='bfloat16')
  x = BATCH.astype(jnp.bfloat16)
  variables = module.init(jax.random.key(0), x)
  y, after = _train(module, variables, x)
  assert y.dtype == jnp.bfloat16
  kinds = {leaf.dtype for leaf in jax.tree.leaves(after)}
  assert kinds == {jnp.dtype('float32')}


@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_statistics_are_of_the_global_batch(shape):
  """A sharded batch is normalised as a whole, not device by device."""
  module = normalization.BatchNorm()
  # Images differ in mean and spread, so that parts tell another story.
  x = BATCH * jnp.arange(1.0, 9.0)[:, None, None]
  variables = module.init(jax.random.key(0), x)

  @jax.jit
  def step(x):
    y, after = _train(module, variables, x)
    gradient = jax.grad(lambda x: jnp.sum(_train(module, variables, x)[0] ** 3))
    return y, after[normalization.NORMS], gradient(x)

  whole = step(x)
  mesh = sharding.make_mesh(*shape)
  with jax.set_mesh(mesh):
    shared = step(jax.device_put(x, sharding.batch_sharding(mesh)))
  assert len(shared[0].sharding.device_set) == 8
  for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  alone, _ = _train(module, variables, x[:1])
  assert np.max(np.abs(alone - whole[0][:1])) > 0.1
