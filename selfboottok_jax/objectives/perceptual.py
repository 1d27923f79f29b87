"""Perceptual distance, faded in: the second term of Eq. (4)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


def warm_up(step: int | Int[Array, ''], warmup_steps: int) -> Float[Array, '']:
  """Rises linearly from 0 at step 0 to 1 at `warmup_steps`; 1 without any."""
  if warmup_steps <= 0:
    return jnp.float32(1.0)
  return jnp.minimum(jnp.asarray(step, jnp.float32) / warmup_steps, 1.0)


def perceptual_loss(
  distance: Callable[..., Float[Array, ' b']],
  params: PyTree,
  images: Float[Array, 'b h w c'],
  reconstruction: Float[Array, 'b h w c'],
  *,
  step: int | Int[Array, ''],
  warmup_steps: int = 10_000,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """L_percep of Eq. (4), with the linear warm-up of SoftVQ.

  Args:
    distance: `distance(params, a, b)`, one distance per image pair; frozen.
    params: its parameters: an argument, so that they can be sharded and need
      not be saved.
    images: what was given, in [-1, 1].
    reconstruction: what came back.
    step: training steps done so far.
    warmup_steps: step from which the full weight counts; 0 for no warm-up.

  Returns:
    The loss, warm-up included (lambda_1 is not), and the plain mean distance,
    which is the number to watch: it does not rise with the warm-up.
  """
  values = distance(params, reconstruction, images)
  mean = jnp.mean(values.astype(jnp.promote_types(values.dtype, jnp.float32)))
  return warm_up(step, warmup_steps) * mean, mean
