"""The generator's losses: errors of the predicted velocity."""

import typing

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@typing.runtime_checkable
class Path(typing.Protocol):
  """Probability path of `flow.path`, as far as the losses need it."""

  def velocity(
    self,
    x: Float[Array, 'b ...'],
    noise: Float[Array, 'b ...'],
    t: Float[Array, ' b'],
  ) -> Float[Array, 'b ...']:
    """The target velocity between data `x` and `noise` at `t`."""
    ...


def velocity_loss(
  prediction: Float[Array, 'b ...'],
  x: Float[Array, 'b ...'],
  noise: Float[Array, 'b ...'],
  t: Float[Array, ' b'],
  path: Path,
) -> Float[Array, ' b']:
  """Mean over a sample of |v - (alpha' x + sigma' noise)|^2, t = 0 data.

  On the linear path the target is noise - x. Computed in float32 or wider.
  """
  predicted, target = _wide(prediction, x, noise, t, path)
  return jnp.mean(
    (predicted - target) ** 2, axis=tuple(range(1, predicted.ndim))
  )


def velocity_cosine(
  prediction: Float[Array, 'b ... e'],
  x: Float[Array, 'b ... e'],
  noise: Float[Array, 'b ... e'],
  t: Float[Array, ' b'],
  path: Path,
) -> Float[Array, ' b']:
  """Mean over a sample of 1 - cosine of predicted and true velocity, in [0, 2].

  The cosine is over the last axis (Yao et al., 2025, "LightningDiT").
  """
  predicted, target = _wide(prediction, x, noise, t, path)
  product = jnp.sum(predicted * target, axis=-1)
  # A fresh network predicts 0; the floor keeps its gradient finite.
  squares = jnp.sum(predicted**2, axis=-1) * jnp.sum(target**2, axis=-1)
  cosine = product * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))
  return jnp.mean(1 - cosine, axis=tuple(range(1, cosine.ndim)))


def _wide(
  prediction: Float[Array, 'b ...'],
  x: Float[Array, 'b ...'],
  noise: Float[Array, 'b ...'],
  t: Float[Array, ' b'],
  path: Path,
) -> tuple[Float[Array, 'b ...'], Float[Array, 'b ...']]:
  """Returns the prediction and its target in float32 or wider."""
  chex.assert_equal_shape((prediction, x, noise))
  prediction, x, noise, t = (
    a.astype(jnp.promote_types(a.dtype, jnp.float32))
    for a in (prediction, x, noise, t)
  )
  return prediction, path.velocity(x, noise, t)
