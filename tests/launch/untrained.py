"""Makes the four runs of a quickstart without compiling their trainings.

python -m tests.launch.untrained WORKDIR
"""

import sys

import jax
import numpy as np

from launch import quickstart
from selfboottok_jax import files
from selfboottok_jax.stages import programs, train
from tests import tiny as models
from tests.launch import tiny


def main() -> None:
  """Trains the four, each from its own configuration."""
  tiny.shrink()
  do_not_compile_training()
  workdir = files.as_path(sys.argv[1])
  for name, config in quickstart._make_configs(workdir, 1.0).items():
    train.train(config, str(workdir / quickstart.FOLDERS[name]))


def do_not_compile_training() -> None:
  """Makes trainings of this process add noise instead of gradients.

  The first state and the train step take half a minute to compile, and most
  tests only need what a training leaves behind. All else is real: each step is
  traced, so what does not fit together is found, and states, metrics and cards
  have their true names and shapes.
  """

  def init(self):
    # The four differ, as what was trained differs.
    seed = len(jax.tree.leaves(self.state))
    return jax.tree.map_with_path(
      lambda path, leaf: _first(path, leaf, seed), self.state
    )

  def compile_(self, first):
    names = self._traced[first].out_info[1]

    def step_fn(state, frozen, batch):
      step = int(state.step) + 1
      moved = state.replace(
        step=jax.device_put(np.int32(step), self.state.step.sharding),
        # Not those of a base, which stays as it is.
        params=state.params
        | {group: _moved(state.params[group]) for group in state.opt},
        ema={group: _moved(tree) for group, tree in state.ema.items()},
      )
      return moved, {name: np.float32(1 / step) for name in names}

    return step_fn

  programs.TrainPrograms.init = init
  programs.TrainPrograms.compile = compile_


def _first(path, leaf, seed):
  """Noise for parameters, the same for their means; 0 for all others."""
  value = np.zeros(leaf.shape, leaf.dtype)
  if path[0].name in ('params', 'ema'):
    value = models.noise(path[1:], leaf, seed)
  return jax.device_put(value, leaf.sharding)


def _moved(tree):
  def move(leaf):
    noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
    moved = np.asarray(leaf) + 0.01 * noise
    return jax.device_put(moved.astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(move, tree)


if __name__ == '__main__':
  main()
