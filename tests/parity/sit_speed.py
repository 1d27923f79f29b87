"""Times a train step of SiT-B/1 + REG beside the same step in eager torch.

  python -m tests.parity.sit_speed [ROUNDS]

A step is forward, losses of tokens, class token and alignment, backward,
clipping, Adam and the running mean of the parameters, on cached codes and
targets, in float32 with nothing computed again, on the same threads. Ours is
that of generator:imagenet256_b, as a training compiles it. The steps take
turns, so that the ratio holds on a busy machine.
"""

import statistics
import sys
import time

import jax
import numpy as np
import torch

from launch import cli
from selfboottok_jax import presets
from selfboottok_jax.evaluation import tables
from selfboottok_jax.stages import benchmark, dry_run, programs
from selfboottok_jax.training import sharding
from tests.parity import torch_sit, torch_steps

BATCH = 8
WARM_UP = 2


def main(rounds: int) -> None:
  """Prints a table: seconds per step, and the ratio to torch."""
  steps = {
    'torch, eager': _torch_step(),
    'jax, as the preset ships': _jax_step(),
    'jax, scanned blocks': _jax_step(unroll=1),
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
    f'SiT-B/1 + REG, batch {BATCH}, float32, {rounds} rounds, '
    f'{torch.get_num_threads()} threads; jax {jax.__version__}, torch '
    f'{torch.__version__}'
  )
  cli.say(tables.table(rows, list(rows[0])))


def _config(**fields):
  config = presets.get_config('generator:imagenet256_b')
  config.data.batch_size = BATCH
  config.assumed.cache = True
  # Memory is no question here, and CPUs have no products of 16 bits.
  config.model.update({'dtype': 'float32', 'remat': 'none', **fields})
  return config


def _jax_step(**fields):
  config = _config(**fields)
  task = dry_run.abstract_task(config).task
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  step_fn = programs.TrainPrograms(config, task, mesh)
  frozen = dry_run.materialise(task.frozen, mesh)
  rng = np.random.default_rng(0)
  batch = sharding.put_batch(
    {
      name: benchmark.made_up(rng, leaf.shape, leaf.dtype)
      for name, leaf in step_fn.batch.items()
    },
    mesh,
  )
  state, step = step_fn.init(), 0

  def run():
    nonlocal state, step
    state, _ = step_fn(state, frozen, batch, step)
    step += 1
    jax.block_until_ready(state)

  return run


def _torch_step():
  config = _config()
  shapes = {
    name: leaf.shape
    for name, leaf in dry_run.abstract_task(config).task.example.items()
  }
  model = config.model
  tokens, dim = shapes['codes']
  network = torch_sit.SiT(
    tokens,
    dim,
    1000,
    model.width,
    model.depth,
    model.heads,
    cls_dim=shapes['cls'][-1],
    align_dim=shapes['targets'][-1],
    align_depth=model.align_depth,
    projector_width=model.projector_width,
  )
  trained = torch_steps.Trained(network, beta2=0.999)
  codes, cls, targets = (
    torch.randn(BATCH, *shapes[name]) for name in ('codes', 'cls', 'targets')
  )
  labels = torch.randint(1000, (BATCH,))

  def run():
    trained.update(
      torch_steps.generator_loss(
        network,
        codes,
        labels,
        cls,
        torch.nn.functional.normalize(targets, dim=-1),
        label_dropout=model.label_dropout,
      )
    )

  return run


if __name__ == '__main__':
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
