"""Entropic optimal transport against converged float64 solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import transport
from tests.golden import fixtures

pytestmark = pytest.mark.golden

NAME = 'tok09_sinkhorn'


@pytest.fixture(scope='module')
def recorded():
  return fixtures.load('tokenizer', NAME)


def points(recorded, dtype):
  """Patches and tokens, the same pair once for every epsilon."""
  return (
    jnp.asarray(recorded.arrays['in_patches'], dtype)[None],
    jnp.asarray(recorded.arrays['in_tokens'], dtype)[None],
  )


def make_solver(patches, tokens, **options):
  """relative_epsilon -> (result, gradient for the tokens)."""

  @jax.jit
  def solve(relative_epsilon):
    def loss(tokens):
      result = transport.transport_loss(
        patches, tokens, relative_epsilon=relative_epsilon, **options
      )
      return result.loss, result

    (_, result), gradient = jax.value_and_grad(loss, has_aux=True)(tokens)
    return result, gradient

  return lambda relative_epsilon: solve(jnp.asarray(relative_epsilon))


def test_converged(recorded):
  arrays = recorded.arrays
  with jax.enable_x64(True):
    patches, tokens = points(recorded, jnp.float64)
    cost = np.asarray(transport.squared_cost(patches, tokens)[0])
    fixtures.check(NAME, 'out_cost', cost, arrays['out_cost'])
    fixtures.check(NAME, 'out_mean_cost', cost.mean(), arrays['out_mean_cost'])
    solve = make_solver(patches, tokens, num_iterations=2_000)
    plans, costs, gradients = [], [], []
    for relative_epsilon in recorded.meta['rel_eps']:
      result, gradient = solve(relative_epsilon)
      assert result.marginal_error < 1e-9
      plans.append(np.asarray(result.plan[0]))
      costs.append(float(result.loss))
      gradients.append(np.asarray(gradient[0]))
  eps = cost.mean() * np.asarray(recorded.meta['rel_eps'])
  plans, costs = np.stack(plans), np.asarray(costs)
  entropy = np.sum(plans * (np.log(plans) - 1), axis=(1, 2))
  actual = {
    'out_eps': eps,
    'out_plan': plans,
    'out_transport_cost': costs,
    'out_sum_plogp_minus_p': entropy,
    'out_objective': costs + eps * entropy,
    'out_grad_tokens_fixed_plan': np.stack(gradients),
  }
  for name, value in actual.items():
    fixtures.check(NAME, name, value, arrays[name])
  assert np.all(costs >= arrays['out_emd'])


def test_marginal_error_after_50_iterations(recorded):
  expected = recorded.arrays['out_marginal_l1_error_at_50_iters']
  with jax.enable_x64(True):
    solve = make_solver(*points(recorded, jnp.float64), num_iterations=50)
    actual = [
      float(solve(rel)[0].marginal_error) for rel in recorded.meta['rel_eps']
    ]
  name = 'out_marginal_l1_error_at_50_iters'
  fixtures.check(NAME, name, np.asarray(actual), expected)


def test_float32_default(recorded):
  arrays = recorded.arrays
  solve = make_solver(*points(recorded, jnp.float32))
  # Fifty iterations cannot do better than what float64 leaves after them.
  enough = arrays['out_marginal_l1_error_at_50_iters'] < 1e-3
  chosen = [
    i
    for i, rel in enumerate(recorded.meta['rel_eps'])
    if rel >= 0.05 and enough[i]
  ]
  assert chosen
  for i in chosen:
    rel = recorded.meta['rel_eps'][i]
    cost = solve(rel)[0].loss
    expected = arrays['out_transport_cost'][i]
    fixtures.check(NAME, 'float32_transport_cost', cost, expected)
