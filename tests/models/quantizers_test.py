import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import quantizers

B, K, E, N, V = 3, 6, 4, 2, 8
ASSIGNMENTS = list(quantizers.ASSIGNMENTS)


def _model(assignment='cosine', **fields):
  return quantizers.SoftVQ(V, N, assignment, **fields)


@pytest.fixture(scope='module')
def z():
  return 2 * jax.random.normal(jax.random.key(0), (B, K, E))


@pytest.fixture(scope='module')
def params(z):
  # Off the sphere, where training leads.
  fresh = _model().init(jax.random.key(1), z)['params']
  return {'codebook': 1.7 * fresh['codebook']}


@functools.partial(jax.jit, static_argnums=(2,), static_argnames=('tau',))
def _apply(params, z, *args, **fields):
  return _model(*args, **fields).apply({'params': params}, z)


def test_codebooks_start_on_the_sphere(z):
  codebook = _model().init(jax.random.key(1), z)['params']['codebook']
  assert codebook.shape == (N, V, E)
  np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize('assignment', ASSIGNMENTS)
def test_codes_are_the_mixtures_of_eq_2_and_3(params, z, assignment):
  out = _apply(params, z, assignment)
  tokens = np.asarray(z, np.float64).reshape(B, N, K // N, E)
  codebook = np.asarray(params['codebook'], np.float64)
  if assignment == 'cosine':
    codebook /= np.linalg.norm(codebook, axis=-1, keepdims=True)
    normal = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    logits = np.einsum('bnse,nve->bnsv', normal, codebook)
  else:
    difference = tokens[:, :, :, None] - codebook[None, :, None]
    logits = -np.linalg.norm(difference, axis=-1)
  weights = np.exp(logits / 0.07)
  weights /= weights.sum(-1, keepdims=True)
  codes = np.einsum('bnsv,nve->bnse', weights, codebook).reshape(B, K, E)
  np.testing.assert_allclose(out.logits, logits, atol=1e-5)
  np.testing.assert_allclose(out.probs, weights, atol=1e-4)
  np.testing.assert_allclose(out.codes, codes, atol=1e-4)
  np.testing.assert_array_equal(out.indices, logits.argmax(-1))


@pytest.mark.parametrize('assignment', ASSIGNMENTS)
def test_segments_use_their_own_codebooks(params, z, assignment):
  shift = np.zeros((N, 1, E), np.float32)
  shift[1] = np.arange(1, E + 1) / 2
  other = {'codebook': params['codebook'] + shift}
  before = _apply(params, z, assignment).codes
  after = _apply(other, z, assignment).codes
  np.testing.assert_array_equal(before[:, : K // N], after[:, : K // N])
  assert np.abs(before - after)[:, K // N :].max(axis=(0, 2)).min() > 1e-3


@pytest.mark.parametrize('assignment', ASSIGNMENTS)
def test_codebook_learns_through_the_mixture_alone(params, z, assignment):
  def of_logits(params):
    out = _apply(params, z, assignment)
    return jnp.sum(jnp.sin(out.logits)) + jnp.sum(jnp.sin(out.probs))

  np.testing.assert_array_equal(
    jax.jit(jax.grad(of_logits))(params)['codebook'], 0.0
  )

  def of_codes(params):
    out = _apply(params, z, assignment)
    return jnp.sum(jnp.sin(out.codes))

  probs = _apply(params, z, assignment).probs

  def with_fixed_assignment(params):
    codebook = params['codebook']
    if assignment == 'cosine':
      codebook = quantizers.unit(codebook)
    codes = jnp.einsum('bnsv,nve->bnse', probs, codebook)
    return jnp.sum(jnp.sin(codes))

  expected = jax.jit(jax.grad(with_fixed_assignment))(params)['codebook']
  assert np.abs(expected).max() > 0.01
  np.testing.assert_allclose(
    jax.jit(jax.grad(of_codes))(params)['codebook'], expected, atol=1e-5
  )


def test_tokens_learn_through_the_assignment(params, z):
  gradient = jax.grad(lambda z: jnp.sum(jnp.sin(_apply(params, z).codes)))(z)
  assert np.all(np.abs(gradient).max(axis=-1) > 0)


def test_cosine_is_blind_to_norms(params, z):
  base = _apply(params, z)
  for other in (
    _apply(params, 5 * z),
    _apply({'codebook': 3 * params['codebook']}, z),
  ):
    np.testing.assert_allclose(other.codes, base.codes, atol=1e-5)
  assert (
    np.abs(
      _apply(params, 5 * z, 'l2').codes - _apply(params, z, 'l2').codes
    ).max()
    > 1e-3
  )


@pytest.mark.parametrize('assignment', ASSIGNMENTS)
def test_a_token_on_a_code_is_that_code(params, assignment):
  chosen = params['codebook'][:, 3:6].reshape(1, N * 3, E)
  out = _apply(params, chosen, assignment, tau=1e-3)
  np.testing.assert_array_equal(out.indices[0], [[3, 4, 5]] * N)
  expected = quantizers.unit(chosen) if assignment == 'cosine' else chosen
  np.testing.assert_allclose(out.codes, expected, atol=1e-4)
  gradient = jax.grad(lambda z: _apply(params, z, assignment).codes.sum())(
    chosen
  )
  assert np.all(np.isfinite(gradient))


def test_unit_of_zero_is_zero_with_a_finite_gradient():
  value, gradient = jax.value_and_grad(lambda x: quantizers.unit(x).sum())(
    jnp.zeros((2, 3))
  )
  assert value == 0
  assert np.all(np.isfinite(gradient))


def test_float32_from_bfloat16_tokens(params, z):
  out = _apply(params, z.astype(jnp.bfloat16))
  for leaf in (out.codes, out.logits, out.probs):
    assert leaf.dtype == jnp.float32


@pytest.mark.parametrize('assignment', ASSIGNMENTS)
def test_chunks_change_neither_values_nor_gradients(params, z, assignment):
  def run(chunk):
    def loss(params, z):
      out = _model(assignment, chunk=chunk).apply({'params': params}, z)
      return jnp.sum(jnp.sin(out.codes)), out

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(params, z)

  (_, plain), expected = run(0)
  for chunk in (1, 3):
    (_, out), gradients = run(chunk)
    for actual, wanted in zip(
      jax.tree.leaves((out, gradients)),
      jax.tree.leaves((plain, expected)),
      strict=True,
    ):
      # Distances cancel to seven digits, and tau divides what is left by 0.07.
      np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(out.indices, plain.indices)


def test_chunks_are_cut_from_each_segment():
  segments = jnp.arange(2 * N * 4).reshape(2, N, 4, 1).astype(jnp.float32)
  chunks = quantizers.split_tokens(segments, 2)
  assert chunks.shape == (2, 2, N, 2, 1)
  np.testing.assert_array_equal(chunks[1, 0, 1], segments[0, 1, 2:])
  np.testing.assert_array_equal(
    quantizers.split_tokens(segments, 0)[0], segments
  )


def test_products_are_of_full_precision(params, z):
  """TPU and GPU would choose other nearest codes by default."""
  for assignment in ASSIGNMENTS:
    jaxpr = jax.make_jaxpr(_model(assignment).apply)({'params': params}, z)
    precisions = [
      eqn.params['precision']
      for eqn in jaxpr.eqns
      if eqn.primitive.name == 'dot_general'
    ]
    highest = jax.lax.Precision.HIGHEST
    assert precisions == [(highest, highest)] * 2, assignment
