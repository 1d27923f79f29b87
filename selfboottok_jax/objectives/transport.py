"""Optimal transport between 2D latents and 1D tokens: Eq. (12) and (13)."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors

# A plan whose `marginal_error` is below this counts as converged: all rows and
# columns together have a hundredth of the mass in the wrong place.
CONVERGED = 0.02


@flax.struct.dataclass
class Transport:
  """The transport loss of a batch and its health statistics.

  Attributes:
    loss: mean over the batch, in units of the cost, not weighted.
    marginal_error: L1 distance of the plan's two marginals from uniform, summed
      over the two and averaged over the batch; large when epsilon is too small
      for the number of iterations.
    converged: share of the images whose error is below CONVERGED.
    spread: std of the tokens / std of the patches, each over its points; falls
      to 0 when epsilon is so large that all tokens settle on the mean.
    plan_spread: share of the patches that a token draws on, see `plan_spread`.
    plan: P*, uniform marginals up to `marginal_error`; carries no gradient.
  """

  loss: Float[Array, '']
  marginal_error: Float[Array, '']
  converged: Float[Array, '']
  spread: Float[Array, '']
  plan_spread: Float[Array, '']
  plan: Float[Array, 'b n k']


def squared_cost(
  patches: Float[Array, 'b n e'], tokens: Float[Array, 'b k e']
) -> Float[Array, 'b n k']:
  """C of Eq. (12), ||x_i - z_j||^2, divided by the width e.

  The division keeps costs of one size whatever the width; it rescales loss and
  epsilon alike and leaves the plan as it is.
  """
  # Around the patches' mean the expanded square loses the fewest digits; a
  # common shift changes neither the cost nor its gradient.
  shift = jax.lax.stop_gradient(jnp.mean(patches, axis=1, keepdims=True))
  patches, tokens = patches - shift, tokens - shift
  # Reduced matmul precision (TPU, TF32) would spoil small distances.
  # The bare product, not a tensor of differences: [b, n, k, e] is too large.
  product = jnp.einsum(
    'bne,bke->bnk', patches, tokens, precision=jax.lax.Precision.HIGHEST
  )
  square = jnp.sum(patches**2, axis=-1)[:, :, None]
  square = square + jnp.sum(tokens**2, axis=-1)[:, None, :]
  return (square - 2 * product) / patches.shape[-1]


def sinkhorn_plan(
  cost: Float[Array, 'b n k'],
  epsilon: Float[Array, ' b'],
  *,
  num_iterations: int,
  symmetric: bool = False,
) -> Float[Array, 'b n k']:
  """P* of Eq. (12) for uniform marginals, by log-domain Sinkhorn; no gradient.

  Eq. (12) prints + epsilon H(P); for the K = exp(-C / epsilon) that follows it,
  H is sum P (log P - 1).

  Args:
    cost: C.
    epsilon: strength of the entropy, in units of the cost, per batch element.
    num_iterations: how many are run, however small the error is before.
    symmetric: `cost` is a symmetric matrix; averaged updates then keep the plan
      symmetric and converge in fewer iterations.

  Returns:
    The plan, in the cost's dtype; total mass 1 up to the marginals' error.
  """
  # Here and not above: half of what it takes to import a training is ott, which
  # sampling, encoding and the generator never use.
  # Evaluated at once: arrays that a module makes for itself would otherwise
  # belong to the trace that happens to import it.
  with jax.ensure_compile_time_eval():
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

  options: dict[str, Any] = {}
  if symmetric:
    options['parallel_dual_updates'] = True
    # A dataclass, which its decorator hides from the type checker.
    options['momentum'] = acceleration.Momentum(  # type: ignore[call-arg]
      start=0, value=0.5
    )
  # Only lse mode: exp(-C / epsilon) is all zeros in float32 for costs of a few
  # hundred epsilon. Implicit differentiation is off because nothing is
  # differentiated here; through the plan it can meet a singular operator.
  solver = sinkhorn.Sinkhorn(
    lse_mode=True,
    threshold=0.0,
    inner_iterations=num_iterations,
    min_iterations=num_iterations,
    max_iterations=num_iterations,
    implicit_diff=None,
    **options,
  )

  def solve(cost: Any, epsilon: Any) -> Any:
    # A dense cost matrix: ten times faster here than ott's PointCloud.
    points = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
    return solver(linear_problem.LinearProblem(points)).matrix

  # ott broadcasts across ranks, which our tests forbid everywhere else. Stopped
  # before and after: the loop is never traced for a gradient.
  with jax.numpy_rank_promotion('allow'):
    plan = jax.vmap(solve)(*jax.lax.stop_gradient((cost, epsilon)))
  return jax.lax.stop_gradient(plan)


def transport_cost(
  plan: Float[Array, 'b n k'], cost: Float[Array, 'b n k']
) -> Float[Array, ' b']:
  """Returns <P, C> of Eq. (13), for each image."""
  return jnp.sum(plan * cost, axis=(1, 2))


def _debiased(
  patches: Float[Array, 'b n e'],
  tokens: Float[Array, 'b k e'],
  cost: Float[Array, 'b n k'],
  epsilon: Float[Array, ' b'],
  plan: Float[Array, 'b n k'],
  num_iterations: int,
) -> Float[Array, ' b']:
  """Computes the Sinkhorn divergence: cross term minus half of each self term.

  Terms are optima of <P, C> + epsilon KL(P | ab): with all three the divergence
  is 0 for equal point sets and positive otherwise (Feydy et al., 2019), so that
  the entropy no longer pulls the tokens together. The patches' self term costs
  n x n but has no gradient; it is there for the value.
  """
  total = _regularised(plan, cost, epsilon)
  for points in (patches, tokens):
    own_cost = squared_cost(points, points)
    own = sinkhorn_plan(
      own_cost, epsilon, num_iterations=num_iterations, symmetric=True
    )
    total = total - 0.5 * _regularised(own, own_cost, epsilon)
  return total


def _regularised(
  plan: Float[Array, 'b n k'],
  cost: Float[Array, 'b n k'],
  epsilon: Float[Array, ' b'],
) -> Float[Array, ' b']:
  # The plan is stopped, so the second term adds to the value alone.
  size = plan.shape[1] * plan.shape[2]
  relative_entropy = jnp.sum(
    jax.scipy.special.xlogy(plan, plan * size), axis=(1, 2)
  )
  return transport_cost(plan, cost) + epsilon * relative_entropy


OT_LOSSES = ('transport', 'debiased')


def transport_loss(
  patches: Float[Array, 'b n _'],
  tokens: Float[Array, 'b k _'],
  *,
  ot_loss: str = 'transport',
  relative_epsilon: float | Float[Array, ''] = 0.05,
  num_iterations: int = 50,
) -> Transport:
  """L_OT of Eq. (13) with the plan of Eq. (12), image by image.

  The loss does not see the order of the patches, nor of the tokens: where
  things are has to come from the reconstruction. The patches are a fixed
  target without gradient; were a projection of theirs trained, zero would be
  the optimum.

  Args:
    patches: X, latents of a 2D autoencoder, one vector per patch.
    tokens: z_L2 before quantisation, of the same width.
    ot_loss: one of OT_LOSSES.
    relative_epsilon: epsilon / mean(C), per image; stays constant in the
      gradient. At 1 all tokens collapse to one point, at 0.25 many do, up to
      0.05 they keep their spread; far below, 50 iterations are too few.
    num_iterations: Sinkhorn iterations.

  Returns:
    Transport, in float32 or wider.

  Raises:
    ConfigError: `ot_loss` is unknown or the widths differ.
  """
  errors.require_choice('loss.ot_loss', ot_loss, OT_LOSSES)
  if patches.shape[2] != tokens.shape[2]:
    raise errors.ConfigError(
      f'tokens of width {tokens.shape[2]} cannot be transported to latents of '
      f'width {patches.shape[2]}; project the tokens to {patches.shape[2]}'
    )
  dtype = jnp.promote_types(tokens.dtype, jnp.float32)
  patches = jax.lax.stop_gradient(patches.astype(dtype))
  tokens = tokens.astype(dtype)
  cost = squared_cost(patches, tokens)
  # Floored: with all points in one place the mean cost is 0.
  epsilon = jnp.maximum(
    relative_epsilon * jax.lax.stop_gradient(jnp.mean(cost, axis=(1, 2))),
    jnp.finfo(dtype).eps,
  )
  plan = sinkhorn_plan(cost, epsilon, num_iterations=num_iterations)
  # Its gradient is that of the optimum of Eq. (12), by the envelope theorem:
  # the plan is optimal, so it may stay constant.
  losses = transport_cost(plan, cost)
  if ot_loss == 'debiased':
    losses = _debiased(patches, tokens, cost, epsilon, plan, num_iterations)
  error = marginal_error(plan)
  return Transport(
    loss=jnp.mean(losses),
    marginal_error=jnp.mean(error),
    converged=jnp.mean((error < CONVERGED).astype(dtype)),
    plan_spread=jnp.mean(plan_spread(plan)),
    spread=jnp.mean(jax.lax.stop_gradient(spread(patches, tokens))),
    plan=plan,
  )


def marginal_error(plan: Float[Array, 'b n k']) -> Float[Array, ' b']:
  """Returns the L1 distance of both marginals from uniform, summed; 0 to 4."""
  rows = jnp.abs(jnp.sum(plan, axis=2) - 1 / plan.shape[1])
  columns = jnp.abs(jnp.sum(plan, axis=1) - 1 / plan.shape[2])
  return jnp.sum(rows, axis=1) + jnp.sum(columns, axis=1)


def plan_spread(plan: Float[Array, 'b n k']) -> Float[Array, ' b']:
  """Returns the share of the patches that a token draws on, 1 / n to 1.

  The exponential of the entropy of a token's column, over n, averaged over
  tokens: 1 / n where every token has a patch of its own, 1 where all tokens
  take equally of all patches.
  """
  mass = jnp.sum(plan, axis=1, keepdims=True)
  share = plan / jnp.maximum(mass, jnp.finfo(plan.dtype).tiny)
  entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=1)
  return jnp.mean(jnp.exp(entropy), axis=1) / plan.shape[1]


def spread(
  patches: Float[Array, 'b n e'], tokens: Float[Array, 'b k e']
) -> Float[Array, ' b']:
  """Std of the tokens / std of the patches, over points, RMS over channels."""

  def deviation(points: Float[Array, 'b n e']) -> Float[Array, ' b']:
    return jnp.sqrt(jnp.mean(jnp.var(points, axis=1), axis=-1))

  # Patches that are all equal have deviation 0.
  floor = jnp.finfo(patches.dtype).eps
  return deviation(tokens) / jnp.maximum(deviation(patches), floor)
