"""Optimisers: gradient transforms with a separate learning rate schedule."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from selfboottok_jax import errors

SCHEDULES = ('cosine', 'constant')


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """A gradient transform, and the learning rate as a function of the step.

  The rate is kept out of the optimiser's state so that a second stage can take
  over the moments of a first without continuing its schedule.

  Attributes:
    transform: maps gradients to directions, for a rate of 1.
    schedule: maps the number of updates made so far to the rate.
  """

  transform: optax.GradientTransformation
  schedule: Callable[[Int[Array, '']], Float[Array, '']]


def build_optimizer(
  *,
  steps: int,
  learning_rate: float,
  schedule: str = 'cosine',
  warmup: float = 0.02,
  final: float = 0.1,
  b1: float = 0.9,
  b2: float = 0.95,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float = 1.0,
) -> Optimizer:
  """Builds AdamW with clipping by the global norm.

  Args:
    steps: length of the training, in updates.
    learning_rate: the rate after warm-up, its maximum.
    schedule: 'cosine' to `final` x learning_rate at `steps`, or 'constant'.
    warmup: linear warm-up from a tenth of the rate, as a fraction of `steps`.
    final: last rate as a fraction of `learning_rate`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: decoupled decay, of matrices only; 0 gives plain Adam.
    clip_norm: largest global gradient norm; 0 for no clipping.

  Returns:
    The optimiser.

  Raises:
    ConfigError: a value is out of range.
  """
  errors.require_choice('optimizer.schedule', schedule, SCHEDULES)
  for name, value, ok, wanted in (
    ('learning_rate', learning_rate, learning_rate > 0, 'a number above 0'),
    ('epsilon', epsilon, epsilon > 0, 'a number above 0'),
    ('warmup', warmup, 0 <= warmup <= 1, 'a number from 0 to 1'),
    ('final', final, 0 <= final <= 1, 'a number from 0 to 1'),
    ('b1', b1, 0 <= b1 < 1, 'a number from 0 to below 1'),
    ('b2', b2, 0 <= b2 < 1, 'a number from 0 to below 1'),
    ('weight_decay', weight_decay, weight_decay >= 0, '0 or more'),
    ('clip_norm', clip_norm, clip_norm >= 0, '0 or more'),
  ):
    errors.require(ok, f'optimizer.{name}', value, wanted)
  # The order matters: clipping comes before the moments see a gradient, and
  # decay after them, which decouples it (AdamW).
  parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon))
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, mask=_kernels))

  warmup_steps = warmup * steps

  def rate(step: Int[Array, '']) -> Float[Array, '']:
    now = jnp.asarray(step, jnp.float32)
    rise: Array | float = 1.0
    if warmup_steps:
      # From a tenth and not from 0, at which the first update would be lost.
      rise = jnp.minimum(1.0, 0.1 + 0.9 * now / max(warmup_steps, 1.0))
    if schedule == 'constant':
      return jnp.asarray(learning_rate * rise, jnp.float32)
    # Clipped, or the cosine would start to fall before the warm-up ends, and
    # rise again after the last step.
    progress = (now - warmup_steps) / max(steps - warmup_steps, 1.0)
    wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return learning_rate * rise * (final + (1 - final) * wave)

  return Optimizer(optax.chain(*parts), rate)


def _kernels(params: PyTree) -> PyTree:
  """Marks the matrices, which weight decay applies to, with True."""
  # By name and not by rank: biases stacked by a scan have two axes too.
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1] == jax.tree_util.DictKey('kernel'), params
  )


def update(
  optimizer: Optimizer,
  grads: PyTree,
  opt_state: PyTree,
  params: PyTree,
  step: Int[Array, ''],
) -> tuple[PyTree, PyTree, Float[Array, '']]:
  """Makes one update.

  Args:
    optimizer: the optimiser.
    grads: gradients, a tree like `params`.
    opt_state: state of `optimizer.transform`.
    params: the parameters to update.
    step: updates made so far in the training.

  Returns:
    (new parameters, new optimiser state, learning rate used).
  """
  directions, opt_state = optimizer.transform.update(grads, opt_state, params)
  rate = optimizer.schedule(step)
  updates = jax.tree.map(lambda d: -rate * d, directions)
  return optax.apply_updates(params, updates), opt_state, rate
