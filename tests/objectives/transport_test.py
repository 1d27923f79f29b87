import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.objectives import transport

B, N, K, E = 2, 16, 8, 4
LOSSES = list(transport.OT_LOSSES)


@pytest.fixture(scope='module')
def patches():
  return jax.random.normal(jax.random.key(0), (B, N, E))


@pytest.fixture(scope='module')
def tokens():
  return jax.random.normal(jax.random.key(1), (B, K, E))


@functools.cache
def solver(ot_loss='transport', **options):
  """(patches, tokens) -> (result, gradient for the tokens), compiled once."""

  def loss(tokens, patches):
    result = transport.transport_loss(
      patches, tokens, ot_loss=ot_loss, **options
    )
    return result.loss, result

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def solve(patches, tokens):
    (_, result), gradient = step(tokens, patches)
    return result, gradient

  return solve


def test_cost_by_hand(patches, tokens):
  patches = patches + 100.0
  tokens = tokens + 100.0
  difference = np.asarray(patches)[:, :, None] - np.asarray(tokens)[:, None]
  expected = np.square(difference.astype(np.float64)).mean(axis=-1)
  actual = transport.squared_cost(patches, tokens)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_plan_is_a_coupling(patches, tokens):
  result, _ = solver(num_iterations=1000)(patches, tokens)
  assert result.plan.shape == (B, N, K)
  assert jnp.all(result.plan >= 0)
  np.testing.assert_allclose(result.plan.sum(axis=2), 1 / N, atol=1e-4)
  np.testing.assert_allclose(result.plan.sum(axis=1), 1 / K, atol=1e-4)
  assert result.marginal_error < 1e-3
  cost = transport.squared_cost(patches, tokens)
  by_hand = jnp.sum(result.plan * cost) / B
  np.testing.assert_allclose(result.loss, by_hand, rtol=1e-5)


def test_gradient_by_hand(patches, tokens):
  """The gradient of <P, C> with P fixed: 2 / e (colsum(P) z - P^T x)."""
  result, gradient = solver()(patches, tokens)
  plan = np.asarray(result.plan)
  pull = plan.sum(axis=1)[..., None] * np.asarray(tokens)
  pull = pull - np.einsum('bnk,bne->bke', plan, np.asarray(patches))
  np.testing.assert_allclose(gradient, 2 / E * pull / B, atol=1e-6)


@pytest.mark.parametrize('ot_loss', LOSSES)
def test_order_of_points_does_not_matter(patches, tokens, ot_loss):
  result, gradient = solver(ot_loss)(patches, tokens)
  shuffled, same = solver(ot_loss)(patches[:, ::-1], tokens)
  np.testing.assert_allclose(shuffled.loss, result.loss, rtol=1e-5)
  np.testing.assert_allclose(same, gradient, atol=1e-5)
  moved, reversed_gradient = solver(ot_loss)(patches, tokens[:, ::-1])
  np.testing.assert_allclose(moved.loss, result.loss, rtol=1e-5)
  np.testing.assert_allclose(reversed_gradient[:, ::-1], gradient, atol=1e-5)


def test_images_do_not_mix(patches, tokens):
  result, _ = solver()(patches, tokens)
  scaled = patches * jnp.array([1.0, 5.0])[:, None, None]
  other, _ = solver()(scaled, tokens)
  np.testing.assert_allclose(other.plan[0], result.plan[0], atol=1e-6)
  assert jnp.max(jnp.abs(other.plan[1] - result.plan[1])) > 1e-3


@pytest.mark.parametrize('ot_loss', LOSSES)
def test_patches_are_a_fixed_target(patches, tokens, ot_loss):
  gradient = jax.jit(
    jax.grad(
      lambda x: transport.transport_loss(x, tokens, ot_loss=ot_loss).loss
    )
  )(patches)
  np.testing.assert_array_equal(gradient, 0)


def test_debiased_gradient_is_that_of_the_value(patches, tokens):
  """Envelope theorem: stopped plans, yet the true derivative."""
  with jax.enable_x64(True):
    x, z = (jnp.asarray(a[:1], jnp.float64) for a in (patches, tokens))

    def mean_cost(z):
      return jnp.mean(transport.squared_cost(x, z))

    epsilon = mean_cost(z)

    @jax.jit
    @jax.value_and_grad
    def loss(z):
      # One epsilon wherever z goes: the loss treats it as constant too.
      return transport.transport_loss(
        x,
        z,
        ot_loss='debiased',
        relative_epsilon=jax.lax.stop_gradient(epsilon / mean_cost(z)),
        num_iterations=200,
      ).loss

    _, gradient = loss(z)
    direction = jax.random.normal(jax.random.key(2), z.shape, jnp.float64)
    h = 1e-4
    ahead, behind = (loss(z + s * h * direction)[0] for s in (1, -1))
    expected = jnp.sum(gradient * direction)
    np.testing.assert_allclose((ahead - behind) / (2 * h), expected, rtol=1e-5)


def test_debiased_is_zero_for_equal_sets_and_positive_otherwise(
  patches, tokens
):
  same, gradient = solver('debiased')(patches, patches)
  np.testing.assert_allclose(same.loss, 0, atol=1e-3)
  assert jnp.max(jnp.abs(gradient)) < 1e-2
  other, _ = solver('debiased')(patches, tokens)
  assert other.loss > 0.1


def descend(patches, tokens, steps=200, **options):
  """Plain gradient descent of the tokens towards fixed patches."""
  solve = solver(**options)
  history = []
  for _ in range(steps):
    result, gradient = solve(patches, tokens)
    tokens = tokens - K * E / 2 * B * 0.5 * gradient
    history.append((float(result.loss), float(result.spread)))
  return history


def test_small_epsilon_fits_without_collapse(patches, tokens):
  history = descend(patches, 0.1 * tokens + 1.0, relative_epsilon=0.05)
  assert history[-1][0] < 0.5 * history[0][0]
  assert history[-1][1] > 0.5


def test_large_epsilon_collapses_and_spread_tells(patches, tokens):
  history = descend(patches, tokens, relative_epsilon=1.0)
  assert history[0][1] > 0.5
  assert history[-1][1] < 0.1


def test_too_few_iterations_show_in_the_marginal_error(patches, tokens):
  few, _ = solver(relative_epsilon=0.005, num_iterations=1)(patches, tokens)
  many, _ = solver(relative_epsilon=0.005, num_iterations=2000)(patches, tokens)
  assert few.marginal_error > 0.05
  assert many.marginal_error < few.marginal_error / 10


@pytest.mark.parametrize('ot_loss', LOSSES)
def test_degenerate_points_are_finite(patches, ot_loss):
  zeros = jnp.zeros((B, K, E))
  for x in (patches, jnp.zeros((B, N, E)), 1e3 * patches):
    result, gradient = solver(ot_loss)(x, zeros)
    assert all(jnp.all(jnp.isfinite(r)) for r in jax.tree.leaves(result))
    assert jnp.all(jnp.isfinite(gradient))


def test_convergence_and_spread_of_plans_that_are_known(patches, tokens):
  whole = jnp.full((1, 4, 2), 1 / 8)
  # One token draws on two of the four patches, the other on one.
  part = jnp.array([[[1, 0], [1, 0], [0, 2], [0, 0]]]) / 4
  spreads = transport.plan_spread(jnp.concatenate([whole, part]))
  np.testing.assert_allclose(spreads, [1, 1.5 / 4], rtol=1e-6)
  few, _ = solver(relative_epsilon=0.005, num_iterations=1)(patches, tokens)
  many, _ = solver(relative_epsilon=0.5, num_iterations=200)(patches, tokens)
  assert (few.converged, many.converged) == (0, 1)
  assert few.plan_spread < many.plan_spread


def test_spread_by_hand(patches):
  np.testing.assert_allclose(
    transport.spread(patches, 0.25 * patches + 3.0), 0.25, rtol=1e-5
  )


def test_low_precision_gives_float32(patches, tokens):
  result, _ = solver(num_iterations=2)(
    patches.astype(jnp.bfloat16), tokens.astype(jnp.bfloat16)
  )
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(result)}
  assert dtypes == {jnp.dtype('float32')}


def test_what_cannot_be_transported(patches, tokens):
  with pytest.raises(errors.ConfigError, match='project the tokens to 4'):
    transport.transport_loss(patches, tokens[..., :3])
  with pytest.raises(errors.ConfigError, match="ot_loss='exact'"):
    transport.transport_loss(patches, tokens, ot_loss='exact')
