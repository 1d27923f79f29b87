"""Tiny tokenizer tasks, their train step and their states."""

import dataclasses
import functools

import jax
import numpy as np

from selfboottok_jax import pretrained
from selfboottok_jax.models import discriminators
from selfboottok_jax.pretrained import dino, vit
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import objective
from selfboottok_jax.stages import tokenizer as tokenizer_task
from selfboottok_jax.training import optim
from selfboottok_jax.training import state as state_lib
from tests import tiny

PATCH, DIM = tiny.TOKENIZER['patch_size'], tiny.TOKENIZER['token_dim']
KINDS = ('dino', 'stylegan')
LOSS = {'projector_width': 8, 'ot_iterations': 10}


def networks():
  hog = pretrained.load_network('hog', patch_size=PATCH)
  return {
    'perceptual': pretrained.load_perceptual('hog', patch_size=PATCH),
    'repa_global': hog,
    'repa_local': hog,
    'transport': pretrained.load_network('dct', patch_size=PATCH, dim=DIM),
  }


@functools.cache
def trunk() -> dino.DinoTrunk:
  """Half the side of the images, so that it crops or averages them."""
  network = vit.Vit((2, 2), 4, 8, 2, 2, 16, taps=(0, 1, 2), gelu='tanh')
  empty = dino.DinoTrunk('tiny', network, None)
  return dataclasses.replace(
    empty, params=tiny.noise_for(empty.init, jax.random.key(0))
  )


def make_critic(kind, goal) -> critic_lib.Critic:
  if kind == 'dino':
    module = discriminators.DinoDiscriminator(kernel=3)
    return critic_lib.Critic(module, goal, trunk())
  module = discriminators.StyleGanDiscriminator(width=4, max_width=8)
  return critic_lib.Critic(module, goal)


def make_task(
  cls=tokenizer_task.TokenizerTask,
  *,
  steps,
  critic='stylegan',
  model=None,
  loss=None,
  **options,
):
  """A task with a critic of one of KINDS, or None."""
  goal = objective.Objective(**LOSS | (loss or {}))
  return cls(
    tiny.make_tokenizer(**(model or {})),
    goal,
    networks(),
    critic and make_critic(critic, goal),
    steps=steps,
    **options,
  )


def make_optimizers(task, steps):
  return {
    group: optim.build_optimizer(
      steps=steps, learning_rate=3e-3, schedule='constant', warmup=0.0
    )
    for group in task.groups
  }


def make_init(task, steps=10, seed=0):
  optimizers = make_optimizers(task, steps)

  def init():
    params, stats = task.init(jax.random.key(seed))
    return state_lib.init_state(params, stats, optimizers, task.ema_groups)

  return init


def init_state(*args, **kwargs):
  return jax.jit(make_init(*args, **kwargs))()


def make_up_state(task, steps=10):
  """A state of noise, whose program need not be compiled."""
  init = make_init(task, steps)
  return tiny.noise_for(lambda _: init(), jax.random.key(0))


def make_step(task, steps=10, phase=0):
  """The train step of the phase that begins at step `phase`."""
  return jax.jit(
    state_lib.make_train_step(
      task.losses(phase),
      make_optimizers(task, steps),
      seed=0,
      ema_limit=0.999,
    )
  )


def train_twice(task, steps=3):
  """States and metrics after a few steps on bytes, and on floats.

  The floats are normalised by numpy, before they come to the devices.
  """
  levels = tiny.levels(4)
  # In its own words: float32, rounded after each operation.
  floats = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
  ends = []
  for images in (levels, floats):
    state, metrics = make_up_state(task), {}
    step = make_step(task, phase=task.milestones[-1])
    for _ in range(steps):
      batch = {'image': images, 'label': np.zeros(4, np.int32)}
      state, metrics = step(state, task.frozen, batch)
    ends.append((state, metrics))
  return ends
