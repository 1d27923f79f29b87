"""The three trainings: the tokenizer, its larger local aligner, the generator.

Each stage has its loss (a `Task`), what it is built from a configuration, how
its state starts and what is measured while it trains (a `Stage`).
`stages.train.train` runs any of them, from its configuration to its last
checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from selfboottok_jax import data, pixels, sizes
from selfboottok_jax.evaluation import cost
from selfboottok_jax.training import loop
from selfboottok_jax.training import state as state_lib


@runtime_checkable
class Task(Protocol):
  """The losses of a training, and the parameters that each one updates.

  A task names its groups of parameters in the order of their updates, each with
  its loss; `training.state` takes the gradients and applies the updates.

  Attributes:
    groups: the trained groups, in update order.
    milestones: steps at which the losses change, beginning with 0. Each phase
      is a program of its own: what has not started costs nothing, and a branch
      inside one program would run convolutions on a single thread of a CPU.
    ema_groups: groups of which a running mean is kept, for use after training.
    frozen: parameters of networks that are arguments of every step, are never
      trained and never saved.
    example: shapes and types of the entries of a batch, for one example.
  """

  groups: tuple[str, ...]
  milestones: tuple[int, ...]
  ema_groups: tuple[str, ...]
  frozen: dict[str, PyTree]
  example: dict[str, jax.ShapeDtypeStruct]

  def losses(self, first_step: int) -> Mapping[str, state_lib.Loss]:
    """The loss of each group that learns in the phase from `first_step` on."""
    ...

  def init(self, rng: jax.Array) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Parameters by group and statistics of a fresh training; traceable."""
    ...

  def components(self, params: Mapping[str, PyTree]) -> list[cost.Component]:
    """All modules and networks that compute, given the groups' parameters."""
    ...


@runtime_checkable
class Stage(Protocol):
  """A training, built from a configuration and ready to run.

  Attributes:
    model_fields: the fields of its model, complete, for config.json.
    meta: what is saved beside every checkpoint; a run that continues must have
      the same.
    held_out: what its evaluators read.
    shown: names of the metrics in progress lines, by their labels there.
  """

  model_fields: dict[str, Any]
  meta: dict[str, Any]
  held_out: list[data.EvalBatches]
  shown: dict[str, str]

  @property
  def task(self) -> Task:
    """Its losses, groups and frozen networks."""
    ...

  def start(self, fresh: state_lib.TrainState) -> state_lib.TrainState:
    """The state that training begins with, from a freshly initialised one."""
    ...

  def evaluators(self, frozen: PyTree) -> Sequence[loop.Evaluator]:
    """Evaluators to run while training; `frozen` is placed on the devices."""
    ...


def image_example(size: sizes.Size) -> dict[str, jax.ShapeDtypeStruct]:
  """The example of tasks that learn from images and labels."""
  return {
    'image': jax.ShapeDtypeStruct((*sizes.pair(size), 3), jnp.uint8),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  }


def normalise(batch: Mapping[str, Array]) -> dict[str, Array]:
  """Returns a batch with its images, if any, as float32 in [-1, 1].

  Pictures come to the devices as bytes, a quarter of the size, and are
  normalised there. Images that are floats, as a reference may have them, stay
  as they are.
  """
  batch = dict(batch)
  if 'image' in batch and batch['image'].dtype == jnp.uint8:
    batch['image'] = pixels.to_float(batch['image'])
  return batch


def normalised(loss: state_lib.Loss) -> state_lib.Loss:
  """Returns a loss that gets its batch from `normalise`."""

  def of_floats(
    trained: PyTree, inputs: state_lib.LossInputs
  ) -> tuple[Array, state_lib.LossOutputs]:
    floats = dataclasses.replace(inputs, batch=normalise(inputs.batch))
    return loss(trained, floats)

  return of_floats
