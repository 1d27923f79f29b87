"""Classifier-free guidance, and sampling with it."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from selfboottok_jax import errors
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import samplers

# Called as (state, t [b], labels [b]); returns a tree like the state.
LabelledVelocity: TypeAlias = Callable[
  [samplers.State, Float[Array, ' b'], Int[Array, ' b']], samplers.State
]
# One for everything, or a tree of them like the state or like its upper part;
# arrays are broadcast, so that channels may have scales of their own.
Scale: TypeAlias = PyTree[float | int | Float[Array, '...']]
# (low, high): times between which guidance acts.
Interval: TypeAlias = tuple[samplers.Time, samplers.Time]


def check_scale(name: str, scale: float | int) -> None:
  """Raises UserError for a guidance scale that is not finite."""
  if not math.isfinite(scale):
    raise errors.UserError(f'{name}={scale}; wanted a finite number')


def check_interval(low: samplers.Time | int, high: samplers.Time | int) -> None:
  """Raises UserError for ends that do not lie in order between 0 and 1."""
  if not 0 <= low <= high <= 1:
    raise errors.UserError(
      f'guidance_low={low} and guidance_high={high}; wanted 0 <= low <= high '
      '<= 1'
    )


def guided(
  velocity: LabelledVelocity,
  labels: Int[Array, ' b'],
  *,
  null_label: int,
  scale: Scale,
  interval: Interval = (0.0, 1.0),
) -> path_lib.Velocity | samplers.Switched:
  """Returns the velocity field of `labels`, guided where low <= t <= high.

  Guided is null + scale (labelled - null), leaf by leaf, from one evaluation
  of [x, x] with [labels, null labels]; a scale of 1 is the labelled velocity.
  Python scales of exactly 1 alone cost no doubled batch; traced ones always
  do, so that one program serves a sweep. A traced interval serves one too; its
  ends are not checked.
  """
  low, high = interval
  numbers = [s for s in jax.tree.leaves(scale) if isinstance(s, int | float)]
  for number in numbers:
    check_scale('scale', number)
  if not samplers.is_traced(low, high):
    check_interval(low, high)

  def plain(x: samplers.State, t: Float[Array, ' b']) -> samplers.State:
    return velocity(x, t, labels)

  # One batch of twice the size keeps the device busier than two evaluations.
  def doubled(x: samplers.State, t: Float[Array, ' b']) -> samplers.State:
    v = velocity(
      jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), x),
      jnp.concatenate([t, t]),
      jnp.concatenate([labels, jnp.full_like(labels, null_label)]),
    )

    def mix(scale: float | Array, x: Array, v: Array) -> Array:
      # A 16-bit network's output is widened before the difference is scaled.
      labelled, null = jnp.split(v.astype(x.dtype), 2)
      scale = jnp.asarray(scale, x.dtype)
      # Axes are added in front explicitly: rank promotion may be forbidden.
      scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
      return null + scale * (labelled - null)

    return jax.tree.map(mix, jax.tree.broadcast(scale, x), x, v)

  if len(numbers) == len(jax.tree.leaves(scale)) and set(numbers) == {1}:
    return plain
  return samplers.Switched(doubled, plain, low, high)


def sample(
  velocity: LabelledVelocity,
  x: samplers.State,
  labels: Int[Array, ' b'],
  *,
  null_label: int,
  scale: Scale = 1.0,
  interval: Interval = (0.0, 1.0),
  sampler: str = 'sde',
  num_steps: int = 250,
  last_step: float = 0.04,
  path: path_lib.Path,
  times: samplers.Times | None = None,
  **options: Any,
) -> samplers.States:
  """Carries noise `x` at t = 1 to data of classes `labels` at t = 0.

  Args:
    velocity: network (x [b, ...], t [b], labels [b]) -> velocity [b, ...], on
      an array or on a tree of them.
    x: standard normal start, see `noise.make_noise`.
    labels: classes in [0, null_label].
    null_label: label of the unconditional model.
    scale: guidance scale, see `guided`; 1 is the conditional model.
    interval: (low, high), the times at which guidance acts.
    sampler: a key of `samplers.SAMPLERS`.
    num_steps: steps; the SDE and Euler evaluate the network once in each, Heun
      twice.
    last_step: where the SDE's last, noise-free step starts.
    path: the path that the network was trained on.
    times: an explicit grid in place of `num_steps` and `last_step`.
    **options: of the sampler: `noise` (which the SDE needs) and `diffusion`,
      `final_step` of Heun, `record`.
  """
  if times is None:
    times = samplers.time_grid(sampler, num_steps, last_step)
  field = guided(
    velocity, labels, null_label=null_label, scale=scale, interval=interval
  )
  return samplers.SAMPLERS[sampler](field, x, times, path=path, **options)
