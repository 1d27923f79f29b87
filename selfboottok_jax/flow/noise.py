"""Noise that belongs to a sample, not to the batch or device it is in."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PyTree

# Shapes of one sample, without the batch axis, as the leaves of a state.
Shapes: TypeAlias = PyTree[tuple[int, ...]]
# From the number of a step to its noise, a tree of arrays [b, ...].
StepNoise: TypeAlias = Callable[
  [int | Int[Array, '']], PyTree[Float[Array, '...']]
]

# Folded in where noise folds in a step: no step number is as large, so that
# labels and noise never share a key.
_LABELS = 2**31 - 1


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
