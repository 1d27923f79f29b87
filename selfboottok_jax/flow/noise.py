"""Noise that belongs to a sample, not to the batch or device it is in."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

# From the number of a step to its noise [b, ...].
StepNoise = Callable[[Int[Array, '']], Float[Array, 'b ...']]


def sample_noise(
  seed: int | Integer[Array, ''],
  sample_indices: Int[Array, ' b'],
  step: int | Int[Array, ''],
  shape: tuple[int, ...],
) -> Float[Array, 'b ...']:
  """Normal float32 noise [b, *shape] that depends on (seed, index, step) only.

  So a sample is the same one whatever batch and whichever device it is in.
  """

  def draw(index):
    key = jax.random.fold_in(jax.random.key(seed), index)
    key = jax.random.fold_in(key, step)
    return jax.random.normal(key, shape, jnp.float32)

  return jax.vmap(draw)(sample_indices)


def make_noise(
  seed: int | Integer[Array, ''],
  sample_indices: Int[Array, ' b'],
  shape: tuple[int, ...],
) -> tuple[Float[Array, 'b ...'], StepNoise]:
  """The start state at t = 1 and the noise of each SDE step, all distinct."""
  start = sample_noise(seed, sample_indices, 0, shape)

  def noise(step):
    return sample_noise(seed, sample_indices, step + 1, shape)

  return start, noise
