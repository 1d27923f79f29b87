"""The generator's loss: squared error of the predicted velocity."""

import typing

import jax.numpy as jnp
from jaxtyping import Array, Float


@typing.runtime_checkable
class Path(typing.Protocol):
  """What the loss asks of a probability path, see `flow.path`."""

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

  def wide(a):
    return a.astype(jnp.promote_types(a.dtype, jnp.float32))

  error = wide(prediction) - path.velocity(wide(x), wide(noise), wide(t))
  return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
