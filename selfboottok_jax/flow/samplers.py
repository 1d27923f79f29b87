"""Samplers from noise to data: compiled loops over a grid of times, and noise.

A state is an array or a tree of them, as tokens and their class token: each
leaf walks by the leaf of its velocity, all at the same times.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from selfboottok_jax import errors
from selfboottok_jax.flow import path as path_lib

# Arrays [b, ...], in float32 or wider.
State: TypeAlias = PyTree[Float[Array, '...']]
# States at several times [s + 1, b, ...], or the last one alone.
States: TypeAlias = PyTree[Float[Array, '...']]
# A time, known in advance or only to the running program.
Time: TypeAlias = float | Float[Array, '']
Times: TypeAlias = Float[np.ndarray, ' _']
# (velocity, state, t, next t, dt, index of the step) -> next state.
Step: TypeAlias = Callable[..., State]
# Shapes of one sample, without the batch axis, as the leaves of a state.
Shapes: TypeAlias = PyTree[tuple[int, ...]]
# From the number of a step to its noise, a tree of arrays [b, ...].
StepNoise: TypeAlias = Callable[
  [int | Int[Array, '']], PyTree[Float[Array, '...']]
]

# Index of the next step, and the state before it.
Carry: TypeAlias = tuple[Int[Array, ''], State]

# Folded in where noise folds in a step: no step number is as large, so that
# labels and noise never share a key.
_LABELS = 2**31 - 1
# Far less than a step, more than what float32 leaves of a time.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Switched:
  """A velocity field with one form for low <= t <= high and another elsewhere.

  A step takes the form of the time that it starts from, in all its stages, so
  steps with one form follow each other and compile to a loop of their own:
  the cheaper form is not computed and thrown away. Ends that are traced leave
  the lengths of these loops to the running program, which then serves all
  intervals, but has neither states to record nor gradients.
  """

  inside: path_lib.Velocity
  outside: path_lib.Velocity
  low: Time
  high: Time

  @property
  def is_traced(self) -> bool:
    """True if only the running program knows the interval."""
    return is_traced(self.low, self.high)

  def at(self, t: float) -> path_lib.Velocity:
    """The form at time `t`, of an interval that is known."""
    return self.inside if is_within(t, self.low, self.high) else self.outside


def is_traced(*times: Time) -> bool:
  """True if one of these is known to the running program alone."""
  return any(isinstance(time, jax.core.Tracer) for time in times)


def is_within(
  t: Time | Float[Array, ' s'], low: Time, high: Time
) -> bool | Bool[Array, '*s']:
  """True where `t` is in an interval, ends included, up to rounding."""
  return (t >= low - _ROUNDING) & (t <= high + _ROUNDING)


def time_grid(
  sampler: str, num_steps: int, last_step: float = 0.04, shift: float = 1.0
) -> Times:
  """The s + 1 times of `num_steps` steps from 1 down to 0.

  The ODEs step evenly. The SDE steps evenly to `last_step` and takes one step
  from there to 0, because its score is infinite at the data. A `shift` s below
  1 puts more of the steps near the noise: t / (t + s (1 - t)), as LightningDiT.
  """
  if num_steps < 1:
    raise errors.UserError(
      f'num_steps={num_steps}: sampling needs at least 1 step'
    )
  if sampler not in SAMPLERS:
    raise errors.UserError(
      f'sampler={sampler!r}: choose one of {", ".join(SAMPLERS)}'
    )
  if not 0 < shift < np.inf:
    raise errors.UserError(
      f'time_shift={shift}: give a number above 0; 1 steps evenly'
    )
  if sampler != 'sde':
    return _shifted(np.linspace(1.0, 0.0, num_steps + 1), shift)
  if not 0 < last_step < 1:
    raise errors.UserError(
      f'last_step={last_step}: the last step starts between t = 0 and 1'
    )
  times = _shifted(np.linspace(1.0, last_step, num_steps), shift)
  return np.append(times, 0.0)


def _shifted(t: Times, shift: float) -> Times:
  return t / (t + shift * (1 - t))


def euler(
  velocity: path_lib.Velocity | Switched,
  x: State,
  times: Times,
  *,
  path: path_lib.Path,
  record: bool = False,
) -> States:
  """Probability flow ODE, first order, one evaluation a step.

  `record` returns the states at all `times` [s + 1, b, ...], not just the last.
  """
  del path  # The ODE needs the velocity alone, not the path behind it.
  return _walk(velocity, x, times, [_euler_step] * (len(times) - 1), record)


def heun(
  velocity: path_lib.Velocity | Switched,
  x: State,
  times: Times,
  *,
  path: path_lib.Path,
  final_step: str | None = None,
  record: bool = False,
) -> States:
  """Probability flow ODE, second order, two evaluations a step.

  Args:
    velocity: field of (x [b, ...], t [b]).
    x: state at times[0].
    times: decreasing grid.
    path: its `min_time` is the smallest time of finite velocity.
    final_step: 'heun', or 'euler', which does not evaluate the velocity at
      times[-1] (EDM, REPA). None is 'heun' unless times[-1] lies below
      `path.min_time`: the linear and cosine velocities are finite at the data.
    record: return the states at all times.
  """
  if final_step is None:
    final_step = 'heun' if times[-1] >= path.min_time else 'euler'
  if final_step not in _ODE_STEPS:
    raise errors.UserError(
      f'final_step={final_step!r}: choose one of {", ".join(_ODE_STEPS)}'
    )
  steps = [_heun_step] * (len(times) - 2) + [_ODE_STEPS[final_step]]
  return _walk(velocity, x, times, steps, record)


def euler_maruyama(
  velocity: path_lib.Velocity | Switched,
  x: State,
  times: Times,
  *,
  path: path_lib.Path,
  noise: Callable[[Int[Array, '']], State],
  diffusion: str = '2t',
  record: bool = False,
) -> States:
  """Reverse SDE dx = (v - w s / 2) dt + sqrt(w) dW, one evaluation a step.

  Args:
    velocity: field of (x [b, ...], t [b]).
    x: state at times[0].
    times: decreasing grid; only the last may be 0.
    path: gives the score s from the velocity.
    noise: standard normal noise, a tree like x, of a step 0 .. s - 1. It is
      called for the last step too, where it counts for nothing: the data has
      no noise.
    diffusion: w(t), a key of DIFFUSIONS.
    record: return the states at all times.
  """
  if diffusion not in DIFFUSIONS:
    raise errors.UserError(
      f'diffusion={diffusion!r}: choose one of {", ".join(DIFFUSIONS)}'
    )
  rate = DIFFUSIONS[diffusion]
  last = len(times) - 2

  def step(
    field: path_lib.Velocity,
    x: State,
    t: Float[Array, ''],
    t_next: Float[Array, ''],
    dt: Float[Array, ''],
    index: Int[Array, ''],
  ) -> State:
    del t_next
    w = rate(path, t)
    # dt is negative, as time runs from noise to data.
    kick = jnp.where(index == last, 0.0, jnp.sqrt(w * -dt))

    def move(x: Array, v: Array, noise: Array) -> Array:
      drift = v - 0.5 * w * path.score_from_velocity(v, x, t)
      return x + drift * dt + kick * noise.astype(x.dtype)

    return jax.tree.map(move, x, _evaluate(field, x, t), noise(index))

  return _walk(velocity, x, times, [step] * (last + 1), record)


def _euler_step(
  field: path_lib.Velocity,
  x: State,
  t: Float[Array, ''],
  t_next: Float[Array, ''],
  dt: Float[Array, ''],
  index: Int[Array, ''],
) -> State:
  del t_next, index
  return _move(x, _evaluate(field, x, t), dt)


def _heun_step(
  field: path_lib.Velocity,
  x: State,
  t: Float[Array, ''],
  t_next: Float[Array, ''],
  dt: Float[Array, ''],
  index: Int[Array, ''],
) -> State:
  del index
  v = _evaluate(field, x, t)
  corrected = _evaluate(field, _move(x, v, dt), t_next)
  return _move(x, jax.tree.map(jnp.add, v, corrected), 0.5 * dt)


def _move(x: State, v: State, dt: Float[Array, '']) -> State:
  return jax.tree.map(lambda x, v: x + dt * v, x, v)


def _evaluate(field: path_lib.Velocity, x: State, t: Float[Array, '']) -> State:
  first = jax.tree.leaves(x)[0]
  # Networks take a time for each sample.
  v = field(x, jnp.full(first.shape[:1], t, first.dtype))
  return jax.tree.map(lambda v, x: v.astype(x.dtype), v, x)


def _walk(
  velocity: path_lib.Velocity | Switched,
  x: State,
  times: Times,
  steps: Sequence[Step],
  record: bool,
) -> States:
  """Runs steps[i] from times[i] to times[i + 1], one loop for each stretch.

  A stretch is a run of steps of the same kind with the same velocity, as far
  as that is known in advance.
  """
  # Hundreds of small increments would be lost in 16 bits.
  x = jax.tree.map(
    lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), x
  )
  fields: list[path_lib.Velocity | Switched] = [velocity] * len(steps)
  if isinstance(velocity, Switched) and not velocity.is_traced:
    fields = [velocity.at(float(t)) for t in times[:-1]]
  dtype = jax.tree.leaves(x)[0].dtype
  # Differences are taken in float64, before the times are rounded.
  grids = (times[:-1], times[1:], np.diff(times))
  columns = tuple(jnp.asarray(grid, dtype) for grid in grids)
  columns += (jnp.arange(len(steps)),)
  states = [jax.tree.map(lambda leaf: leaf[None], x)]
  stretches = itertools.groupby(
    range(len(steps)), lambda i: (steps[i], fields[i])
  )
  for (step, field), stretch in stretches:
    indices = list(stretch)
    rows = tuple(c[indices[0] : indices[-1] + 1] for c in columns)
    if isinstance(field, Switched):
      if record:
        raise ValueError('record wants an interval that is known, not a traced')
      x = _switch(field, x, rows, step)
      continue

    # Defaults bind this stretch's step and field, not the loop's last ones.
    def body(
      x: State,
      row: tuple[Array, ...],
      step: Step = step,
      field: path_lib.Velocity = field,
    ) -> tuple[State, State | None]:
      x = step(field, x, *row)
      return x, (x if record else None)

    x, seen = jax.lax.scan(body, x, rows)
    states.append(seen)
  if not record:
    return x
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)


def _switch(
  velocity: Switched, x: State, rows: tuple[Array, ...], step: Step
) -> State:
  """Runs `step` over all rows in two alternating loops of unknown length."""
  is_inside = jnp.asarray(is_within(rows[0], velocity.low, velocity.high))
  count = len(is_inside)

  def run(field: path_lib.Velocity, side: bool, carry: Carry) -> Carry:
    def goes_on(carry: Carry) -> Bool[Array, '']:
      return (carry[0] < count) & (is_inside[carry[0]] == side)

    def body(carry: Carry) -> Carry:
      index, x = carry
      return index + 1, step(field, x, *(row[index] for row in rows))

    return jax.lax.while_loop(goes_on, body, carry)

  # Each loop ends at once where it has no step to take, so the order of the
  # two does not matter.
  def both(carry: Carry) -> Carry:
    carry = run(velocity.outside, False, carry)
    return run(velocity.inside, True, carry)

  carry = jnp.int32(0), x
  return jax.lax.while_loop(lambda carry: carry[0] < count, both, carry)[1]


_ODE_STEPS = {'euler': _euler_step, 'heun': _heun_step}

# w(t) of the SDE; both are the same on the linear path.
DIFFUSIONS = {
  '2t': lambda path, t: 2 * t,
  'sigma': lambda path, t: 2 * path.sigma(t),
}

SAMPLERS: dict[str, Callable[..., States]] = {
  'sde': euler_maruyama,
  'ode': euler,
  'heun': heun,
}


def sample_noise(
  seed: int | Integer[Array, ''],
  sample_indices: Int[Array, ' b'],
  step: int | Int[Array, ''],
  shapes: Shapes,
) -> PyTree[Float[Array, '...']]:
  """Normal float32 noise [b, *shape] that depends on (seed, index, step) only.

  So a sample is the same one whatever batch and whichever device it is in.
  `shapes` is a shape or a dict of them, whose leaves are independent.
  """
  leaves, tree = jax.tree.flatten(shapes, is_leaf=_is_shape)

  # Mapped over indices with a key each: one key for the batch would make a
  # sample depend on its position and on the batch size.
  def draw(index: Int[Array, '']) -> list[Array]:
    key = jax.random.fold_in(_sample_key(seed, index), step)
    keys = jax.random.split(key, len(leaves))
    return [
      jax.random.normal(key, shape, jnp.float32)
      for key, shape in zip(keys, leaves, strict=True)
    ]

  return jax.tree.unflatten(tree, jax.vmap(draw)(sample_indices))


def make_noise(
  seed: int | Integer[Array, ''],
  sample_indices: Int[Array, ' b'],
  shapes: Shapes,
) -> tuple[PyTree[Float[Array, '...']], StepNoise]:
  """The start state at t = 1 and the noise of each SDE step, all distinct."""
  start = sample_noise(seed, sample_indices, 0, shapes)

  def noise(step: int | Int[Array, '']) -> PyTree[Float[Array, '...']]:
    # Number 0 is the start state's.
    return sample_noise(seed, sample_indices, step + 1, shapes)

  return start, noise


def sample_labels(
  seed: int | Integer[Array, ''],
  sample_indices: Int[Array, ' b'],
  num_classes: int,
) -> Int[Array, ' b']:
  """Uniform random classes that depend on (seed, index) only."""

  def draw(index: Int[Array, '']) -> Int[Array, '']:
    key = jax.random.fold_in(_sample_key(seed, index), _LABELS)
    return jax.random.randint(key, (), 0, num_classes)

  return jax.vmap(draw)(sample_indices)


def _sample_key(
  seed: int | Integer[Array, ''], index: Int[Array, '']
) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), index)


def _is_shape(node: object) -> bool:
  return isinstance(node, tuple)
