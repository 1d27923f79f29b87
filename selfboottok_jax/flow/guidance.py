"""Classifier-free guidance, and sampling with it."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from selfboottok_jax import errors
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import samplers

LabelledVelocity = Callable[
  [Float[Array, 'b ...'], Float[Array, ' b'], Int[Array, ' b']],
  Float[Array, 'b ...'],
]


def guided(
  velocity: LabelledVelocity,
  labels: Int[Array, ' b'],
  *,
  null_label: int,
  scale: float | Float[Array, ''],
  interval: tuple[float, float] = (0.0, 1.0),
) -> path_lib.Velocity | samplers.Switched:
  """The velocity of `labels`, guided where low <= t <= high.

  Guided is null + scale (labelled - null) on all channels, from one evaluation
  of [x, x] with [labels, null labels]. A Python scale of exactly 1 is the
  labelled velocity and costs no doubled batch; a traced one always does, so
  that one program serves a sweep.
  """
  low, high = interval
  if isinstance(scale, float) and not math.isfinite(scale):
    raise errors.UserError(f'guidance scale {scale}: give a finite number')
  if not 0 <= low <= high <= 1:
    raise errors.UserError(
      f'guidance interval ({low}, {high}): give 0 <= low <= high <= 1'
    )

  def plain(x, t):
    return velocity(x, t, labels)

  def doubled(x, t):
    v = velocity(
      jnp.concatenate([x, x]),
      jnp.concatenate([t, t]),
      jnp.concatenate([labels, jnp.full_like(labels, null_label)]),
    )
    labelled, null = jnp.split(v.astype(x.dtype), 2)
    return null + scale * (labelled - null)

  if isinstance(scale, int | float) and scale == 1:
    return plain
  return samplers.Switched(doubled, plain, low, high)


def sample(
  velocity: LabelledVelocity,
  x: Float[Array, 'b ...'],
  labels: Int[Array, ' b'],
  *,
  null_label: int,
  scale: float | Float[Array, ''] = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
  sampler: str = 'sde',
  num_steps: int = 250,
  last_step: float = 0.04,
  path: path_lib.Path,
  times: samplers.Times | None = None,
  **options,
) -> Float[Array, '...']:
  """Carries noise `x` at t = 1 to data of classes `labels` at t = 0.

  Args:
    velocity: network (x [b, ...], t [b], labels [b]) -> velocity [b, ...].
    x: standard normal start, see `noise.make_noise`.
    labels: classes in [0, null_label].
    null_label: label of the unconditional model.
    scale: guidance scale; 1 is the conditional model.
    interval: (low, high), the times at which guidance acts.
    sampler: a key of `samplers.SAMPLERS`.
    num_steps: steps; the SDE and Euler evaluate the network once in each, Heun
      twice.
    last_step: where the SDE's last, noise-free step starts.
    path: the path that the network was trained on.
    times: a grid of one's own in place of `num_steps` and `last_step`.
    **options: of the sampler: `noise` (which the SDE needs) and `diffusion`,
      `final_step` of Heun, `record`.
  """
  if times is None:
    times = samplers.time_grid(sampler, num_steps, last_step)
  field = guided(
    velocity, labels, null_label=null_label, scale=scale, interval=interval
  )
  return samplers.SAMPLERS[sampler](field, x, times, path=path, **options)
