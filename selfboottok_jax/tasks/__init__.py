"""What is trained and on what loss.

A task names its groups of parameters in the order of their updates, each with
its loss; the machinery in `training` does the rest. No task takes a gradient or
applies an update.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import PyTree

from selfboottok_jax.training import state as state_lib


class Task(Protocol):
  """What the train step and the loop ask of a task.

  Attributes:
    losses: the loss of each trained group, in update order.
    ema_groups: groups of which a running mean is served.
    frozen: parameters of networks that are arguments of every step, are never
      trained and never saved.
  """

  losses: Mapping[str, state_lib.Loss]
  ema_groups: tuple[str, ...]
  frozen: PyTree

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Parameters by group and statistics of a fresh training; traceable."""
    ...


def count(tree: PyTree) -> int:
  """Numbers in a tree of arrays, or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
