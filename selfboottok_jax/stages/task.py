"""What the train step and the loop ask of a stage's loss."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from selfboottok_jax.evaluation import cost
from selfboottok_jax.training import state as state_lib


class Task(Protocol):
  """What the train step and the loop ask of a task.

  Attributes:
    groups: the trained groups, in update order.
    milestones: steps at which the losses change, beginning with 0. Each phase
      is a program of its own: what has not started costs nothing, and a branch
      inside one program would run convolutions on a single thread of a CPU.
    ema_groups: groups of which a running mean is served.
    frozen: parameters of networks that are arguments of every step, are never
      trained and never saved.
    example: shapes and types of what a batch holds of one example.
  """

  groups: tuple[str, ...]
  milestones: tuple[int, ...]
  ema_groups: tuple[str, ...]
  frozen: PyTree
  example: Mapping[str, jax.ShapeDtypeStruct]

  def losses(self, first_step: int) -> Mapping[str, state_lib.Loss]:
    """The loss of each group that learns in the phase from `first_step` on."""
    ...

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Parameters by group and statistics of a fresh training; traceable."""
    ...

  def components(self, params: Mapping[str, PyTree]) -> list[cost.Component]:
    """All that computes, frozen networks included, given the groups."""
    ...


def image_example(size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """An example of tasks that learn from images and labels."""
  return {
    'image': jax.ShapeDtypeStruct((size, size, 3), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  }
