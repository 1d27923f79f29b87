"""Times a train step of SiT-B/1 beside the same step in eager torch.

  python -m tests.parity.sit_speed [ROUNDS]

A step is forward, backward, clipping, Adam and the running mean of the
parameters, in float32, on the same threads. The steps take turns, so that the
ratio holds on a busy machine.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from launch import cli
from selfboottok_jax.evaluation import tables
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.models import sit
from selfboottok_jax.objectives import velocity
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.training import optim
from selfboottok_jax.training import state as state_lib
from tests.parity import torch_sit, torch_steps

BATCH, TOKENS, DIM, CLASSES = 16, 64, 32, 1000
WARM_UP = 2


def main(rounds: int) -> None:
  """Prints a table: seconds per step, and the ratio to torch."""
  rng = np.random.default_rng(0)
  codes = rng.normal(size=(BATCH, TOKENS, DIM)).astype(np.float32)
  labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
  steps = {
    'torch, eager': _torch_step(codes, labels),
    'jax, scanned blocks': _jax_step(codes, labels, unroll=1),
    'jax, unrolled blocks': _jax_step(codes, labels, unroll=12),
  }
  seconds = {name: [] for name in steps}
  for index in range(WARM_UP + rounds):
    for name, step in steps.items():
      began = time.monotonic()
      step()
      if index >= WARM_UP:
        seconds[name].append(time.monotonic() - began)
  reference = seconds['torch, eager']
  rows = [
    {
      'step': name,
      'seconds (median)': statistics.median(taken),
      'least': min(taken),
      'most': max(taken),
      'ratio to torch (median of pairs)': statistics.median(
        one / other for one, other in zip(taken, reference, strict=True)
      ),
    }
    for name, taken in seconds.items()
  ]
  cli.say(
    f'SiT-B/1, batch {BATCH} x {TOKENS} tokens, float32, {rounds} rounds, '
    f'{torch.get_num_threads()} threads; jax {jax.__version__}, torch '
    f'{torch.__version__}'
  )
  cli.say(tables.table(rows, list(rows[0])))


def _jax_step(codes, labels, unroll):
  config = generator_config.get_config('imagenet256_b')
  fields = config.model.to_dict() | {
    'dtype': 'float32', 'remat': 'none', 'unroll': unroll,
  }  # fmt: skip
  model = sit.SiT(TOKENS, DIM, CLASSES, **fields)
  path = path_lib.PATHS['linear']

  def loss(params, inputs):
    x = inputs.batch['codes']
    time_key, noise_key, label_key = jax.random.split(inputs.rng, 3)
    t = jax.random.uniform(time_key, x.shape[:1])
    noise = jax.random.normal(noise_key, x.shape)
    prediction = model.apply(
      {'params': params},
      path.interpolate(x, noise, t),
      t,
      inputs.batch['label'],
      train=True,
      rngs={'dropout': label_key},
    ).tokens
    value = jnp.mean(velocity.velocity_loss(prediction, x, noise, t, path))
    return value, state_lib.LossOutputs({}, inputs.stats, inputs.carry)

  optimizers = {
    'generator': optim.build_optimizer(
      steps=1000,
      learning_rate=torch_steps.LEARNING_RATE,
      schedule='constant',
      warmup=0.0,
      clip_norm=torch_steps.CLIP,
    )
  }
  step = jax.jit(
    state_lib.make_train_step(
      {'generator': loss}, optimizers, seed=0, ema_limit=torch_steps.DECAY
    ),
    donate_argnums=0,
  )

  @jax.jit
  def init():
    params = model.init(jax.random.key(0), codes, labels * 0.0, labels)
    groups = {'generator': params['params']}
    return state_lib.init_state(groups, {}, optimizers, ('generator',))

  state = init()
  batch = {'codes': jnp.asarray(codes), 'label': jnp.asarray(labels)}

  def run():
    nonlocal state
    state, _ = step(state, {}, batch)
    jax.block_until_ready(state)

  return run


def _torch_step(codes, labels):
  config = generator_config.get_config('imagenet256_b').model
  network = torch_sit.SiT(
    TOKENS, DIM, CLASSES, config.width, config.depth, config.heads
  )
  trained = torch_steps.Trained(network, beta2=0.999)
  x = torch.from_numpy(codes)
  y = torch.from_numpy(labels).long()

  def run():
    trained.update(
      torch_steps.generator_loss(
        network, x, y, label_dropout=config.label_dropout
      )
    )

  return run


if __name__ == '__main__':
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
