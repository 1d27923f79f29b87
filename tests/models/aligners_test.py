import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import aligners
from tests import tiny

K, E = 6, 3


@pytest.fixture(scope='module')
def z():
  return jax.random.normal(jax.random.key(0), (2, K, E))


def _local2d(**fields):
  return aligners.Local2D(16, 2, 2, **fields)


@pytest.fixture(scope='module')
def params(z):
  return tiny.awake(
    tiny.noise_for(_local2d().init, jax.random.key(1), z)['params']
  )


def test_projector_works_token_by_token(z):
  model = aligners.Projector(5, 8)
  params = jax.jit(model.init)(jax.random.key(0), z)
  assert model.apply(params, z).shape == (2, K, 5)
  jacobian = jax.jit(jax.jacrev(lambda z: model.apply(params, z)[0].sum(-1)))(z)
  seen = np.abs(jacobian).max(axis=-1) > 0
  np.testing.assert_array_equal(seen[:, 0], np.eye(K, dtype=bool))
  np.testing.assert_array_equal(seen[:, 1], False)


def test_projector_is_three_layers_with_silu_between(z):
  model = aligners.Projector(5, 8)
  params = jax.jit(model.init)(jax.random.key(0), z)
  x = np.asarray(z, np.float64)
  for i in range(3):
    layer = params['params'][f'layer{i}']
    x = x @ np.asarray(layer['kernel']) + np.asarray(layer['bias'])
    x = x / (1 + np.exp(-x)) if i < 2 else x
  np.testing.assert_allclose(model.apply(params, z), x, atol=1e-5)


def _jacobian_in_queries(params, z, causal):
  """Marks at [i, j] whether output i depends on learned query j."""
  model = _local2d(causal=causal)

  def outputs(queries):
    variables = {'params': params | {'queries': queries}}
    # No plain sum: gradients of a sum over the norm's outputs can cancel.
    return jnp.sum(jnp.sin(model.apply(variables, z)), axis=(0, 2))

  jacobian = jax.jit(jax.jacrev(outputs))(params['queries'])
  return np.abs(jacobian[:, 0]).max(axis=-1) > 0


def test_causal_outputs_depend_on_no_later_query(params, z):
  seen = _jacobian_in_queries(params, z, causal=True)
  np.testing.assert_array_equal(seen, np.tril(np.ones((K, K), bool)))


def test_without_causality_all_queries_matter(params, z):
  assert _jacobian_in_queries(params, z, causal=False).all()


@pytest.mark.parametrize('causal', [True, False])
def test_every_output_depends_on_every_global_token(params, z, causal):
  model = _local2d(causal=causal)
  jacobian = jax.jit(
    jax.jacrev(
      lambda z: jnp.sum(jnp.sin(model.apply({'params': params}, z)[0]), -1)
    )
  )(z)
  seen = np.abs(jacobian).max(axis=-1) > 0
  assert seen[:, 0].all()
  assert not seen[:, 1].any()


def test_output_is_float32_of_the_input_shape(params, z):
  wide = jax.jit(_local2d().apply)({'params': params}, z)
  narrow = jax.jit(_local2d(dtype='bfloat16').apply)({'params': params}, z)
  assert narrow.dtype == jnp.float32
  assert narrow.shape == wide.shape == z.shape
  assert 0 < np.abs(narrow - wide).max() < 0.2


@pytest.mark.slow
def test_remat_and_unroll_change_nothing(params, z):
  base, other = (
    jax.jit(
      jax.value_and_grad(
        lambda p, model=model: jnp.sum(jnp.sin(model.apply({'params': p}, z)))
      )
    )(params)
    for model in (_local2d(), _local2d(remat=True, unroll=2))
  )
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
