"""Optimisers: an optax transform without a rate, and a schedule by step."""

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
  """A gradient transform, and the rate as a function of the training's step.

  The rate is kept out of the optimiser's state so that a second stage can take
  over moments without taking over where the first stage's schedule ended.
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
  """AdamW with clipping by global norm.

  Args:
    steps: length of the training, in updates.
    learning_rate: the rate after warm-up.
    schedule: 'cosine' to `final` x learning_rate at `steps`, or 'constant'.
    warmup: linear warm-up from a tenth of the rate, as a fraction of `steps`.
    final: last rate as a fraction of the first.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: decoupled, on matrices only; 0 is plain Adam.
    clip_norm: largest global gradient norm; 0 does not clip.

  Returns:
    The optimiser.

  Raises:
    ConfigError: a value out of range.
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
  parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon))
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, mask=_kernels))

  warmup_steps = warmup * steps

  def rate(step: Int[Array, '']) -> Float[Array, '']:
    now = jnp.asarray(step, jnp.float32)
    rise = 1.0
    if warmup_steps:
      rise = jnp.minimum(1.0, 0.1 + 0.9 * now / max(warmup_steps, 1.0))
    if schedule == 'constant':
      return jnp.asarray(learning_rate * rise, jnp.float32)
    progress = (now - warmup_steps) / max(steps - warmup_steps, 1.0)
    wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return learning_rate * rise * (final + (1 - final) * wave)

  return Optimizer(optax.chain(*parts), rate)


def _kernels(params: PyTree) -> PyTree:
  """True at the matrices; by name, as stacked biases have two axes too."""
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
  """One update; returns parameters, optimiser state and the rate used."""
  directions, opt_state = optimizer.transform.update(grads, opt_state, params)
  rate = optimizer.schedule(step)
  updates = jax.tree.map(lambda d: -rate * d, directions)
  return optax.apply_updates(params, updates), opt_state, rate
