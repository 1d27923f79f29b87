"""Benchmark of a training on this machine: its step, its loop and its data."""

import contextlib
import dataclasses
import datetime
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import data
from selfboottok_jax.evaluation import cost
from selfboottok_jax.stages import checks, dry_run, inputs
from selfboottok_jax.stages.programs import (
  TrainPrograms,
  describe_devices,
  no_compilation_cache,
)
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import loop, sharding
from selfboottok_jax.training.state import TrainState

Batches = Iterator[dict[str, np.ndarray]]

# Different host batches that the loop reads in place of a pipeline.
_HOST_BATCHES = 4


class _Seconds(NamedTuple):
  """Seconds per step, one number for each round.

  Attributes:
    model: the compiled step alone.
    loop: the loop around it, on batches that cost nothing; empty if it was
      not wanted.
    data: the pipeline alone; empty without data.
    training: the loop on the pipeline's batches; empty without data.
  """

  model: list[float]
  loop: list[float]
  data: list[float]
  training: list[float]


class Clock:
  """Measures seconds per step of the parts of a training."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    step_fn: TrainPrograms,
    frozen: PyTree,
    mesh: Mesh,
    steps: int,
  ):
    """Makes a few host batches, and puts one of them on the devices."""
    self._step_fn, self._frozen, self._mesh = step_fn, frozen, mesh
    self._steps, self._log_every = steps, config.train.log_every
    rng = np.random.default_rng(0)
    local = config.data.batch_size // jax.process_count()
    self._batches = [
      {
        name: made_up(rng, (local, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in step_fn.batch.items()
      }
      for _ in range(_HOST_BATCHES)
    ]
    self._placed = sharding.put_batch(self._batches[0], mesh)

  def model(self, state: TrainState) -> tuple[TrainState, float]:
    """Times the compiled step alone, on a batch that is on the devices."""
    step = int(state.step)
    jax.block_until_ready(state)
    began = time.monotonic()
    for index in range(self._steps):
      state, _ = self._step_fn(state, self._frozen, self._placed, step + index)
    jax.block_until_ready(state)
    return state, (time.monotonic() - began) / self._steps

  def loop(
    self, state: TrainState, batches: Batches
  ) -> tuple[TrainState, float]:
    """Times the whole loop, without evaluations and checkpoints."""
    step = int(state.step)
    schedule = loop.Schedule(
      steps=step + self._steps,
      log_every=self._log_every,
      evaluate_every=0,
      save_every=0,
    )
    with (
      tempfile.TemporaryDirectory() as folder,
      contextlib.closing(
        logging_lib.MetricsWriter(folder, start_step=step)
      ) as writer,
      open(os.devnull, 'w') as silence,
      contextlib.redirect_stderr(silence),
    ):
      began = time.monotonic()
      state = loop.run(
        state,
        self._step_fn,
        self._frozen,
        batches,
        name='benchmark',
        schedule=schedule,
        mesh=self._mesh,
        checkpointer=_KeepsNothing(),
        meta={},
        writer=writer,
      )
      jax.block_until_ready(state)
      return state, (time.monotonic() - began) / self._steps

  def data(self, batches: data.TrainBatches) -> float:
    """Times the pipeline alone, up to batches in host memory."""
    # Batches that the pipeline prepared before the clock starts do not count.
    for _ in range(2 * batches.ahead):
      next(batches)
    count = max(self._steps, 4 * batches.ahead)
    began = time.monotonic()
    for _ in range(count):
      next(batches)
    return (time.monotonic() - began) / count

  def made_up(self) -> Batches:
    """Yields the same host batches for ever: they cost nothing to make."""
    while True:
      yield from self._batches


def measure(
  config: ml_collections.ConfigDict,
  steps: int,
  rounds: int,
  *,
  with_loop: bool = True,
) -> tuple[dict[str, Any], list[str]]:
  """Times the last phase of a training, in which every loss is on.

  Works without data and without a tokenizer, on made-up images and codes.

  Args:
    config: of the training.
    steps: updates in a round.
    rounds: number of rounds; results are medians over them.
    with_loop: time the loop and the data too, not the step alone.

  Returns:
    Everything measured, by name; None where this machine or the configuration
    does not allow a measure. And sentences about what was assumed.
  """
  mesh = check_mesh(config)
  source = None
  if with_loop and inputs.has_data(config):
    source = inputs.open_data(config, 'train')
  sketch = dry_run.abstract_task(config)
  began = time.monotonic()
  step_fn = TrainPrograms(config, sketch.task, mesh)
  trace_seconds = time.monotonic() - began
  # A program read back from the cache would have no compile time.
  with no_compilation_cache():
    step_fn.compile(max(sketch.task.milestones))
  card = step_fn.card()
  clock, state = start(config, sketch, step_fn, mesh, steps)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    photos = None
    if source is not None:
      photos = inputs.train_batches(config, source, start_step=0)
      stack.enter_context(contextlib.closing(photos))
    seconds = _measure_rounds(clock, state, rounds, photos, with_loop)
  record = _record(config, mesh, card, seconds) | {
    'trace_seconds': trace_seconds
  }
  notes = [f'assumed: {line}' for line in sketch.assumed]
  if with_loop and source is None:
    notes.append('data rates not measured: data.path is empty')
  return record, notes


def check_mesh(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the devices; ConfigError for a configuration they cannot train."""
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  checks.check(config)
  return mesh


def start(
  config: ml_collections.ConfigDict,
  sketch: dry_run.AbstractTask,
  step_fn: TrainPrograms,
  mesh: Mesh,
  steps: int,
) -> tuple[Clock, TrainState]:
  """A clock, and a state at the beginning of the last phase."""
  frozen = dry_run.materialise(sketch.task.frozen, mesh)
  state = step_fn.init()
  first = max(sketch.task.milestones)
  state = dataclasses.replace(state, step=_scalar(first, state.step))
  return Clock(config, step_fn, frozen, mesh, steps), state


def _record(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  card: cost.Card,
  seconds: _Seconds,
) -> dict[str, Any]:
  """All measures by name: medians over the rounds."""
  step_seconds = statistics.median(seconds.model)
  # No pairs if the loop was not timed.
  overheads = [
    inside / bare - 1
    for inside, bare in zip(seconds.loop, seconds.model, strict=False)
  ]
  batch = config.data.batch_size
  memory, memory_of = _peak_memory()
  per_second = card.flops.model * batch / step_seconds
  peak = cost.peak_flops(jax.devices()[0].device_kind)
  trained = sum(r.flops.model for r in card.rows if r.trained is not False)
  return {
    'task': config.task,
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'devices': describe_devices(mesh),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'batch_size': batch,
    'dtype': config.model.dtype,
    'attention': config.model.attention,
    'remat': config.model.remat,
    'unroll': config.model.unroll,
    'trained_parameters': card.parameters(trained=True),
    'frozen_parameters': card.parameters(trained=False),
    'gflops_per_image': card.flops.model / 1e9,
    'compile_seconds': card.compile_seconds,
    'step_seconds': step_seconds,
    'step_seconds_least': min(seconds.model),
    'step_seconds_most': max(seconds.model),
    'images_per_second': batch / step_seconds,
    'loop_step_seconds': _median(seconds.loop),
    'loop_overhead': _median(overheads),
    'loop_overhead_quartiles': _quartiles(overheads),
    'data_images_per_second': _rate(batch, seconds.data),
    'training_images_per_second': _rate(batch, seconds.training),
    'tflops_per_second': per_second / 1e12,
    'mfu': peak and per_second / (peak * mesh.size),
    # The frozen networks' share is arithmetic too, but nobody learns from it.
    'mfu_trained': peak and trained * batch / step_seconds / (peak * mesh.size),
    'mfu_of': peak and f'{peak / 1e12:.0f} TFLOP/s, dense bfloat16',
    'step_memory_bytes': card.memory and card.memory.total,
    'peak_memory_bytes': memory,
    'peak_memory_of': memory_of,
  }


def _measure_rounds(
  clock: Clock,
  state: TrainState,
  rounds: int,
  photos: data.TrainBatches | None,
  with_loop: bool,
) -> _Seconds:
  """Times `rounds` of everything.

  The data comes last: its threads would disturb the other clocks.
  """
  seconds = _Seconds([], [], [], [])
  # Warm caches and allocators before the clock starts.
  state, _ = clock.model(state)
  if not with_loop:
    for _ in range(rounds):
      state, taken = clock.model(state)
      seconds.model.append(taken)
    return seconds
  state, _ = clock.loop(state, clock.made_up())
  for index in range(rounds):
    # Step and loop take turns in going first: a drift of the machine cancels.
    for inside in (False, True)[:: -1 if index % 2 else 1]:
      if inside:
        state, taken = clock.loop(state, clock.made_up())
        seconds.loop.append(taken)
      else:
        state, taken = clock.model(state)
        seconds.model.append(taken)
  if photos is None:
    return seconds
  for _ in range(rounds):
    seconds.data.append(clock.data(photos))
    state, taken = clock.loop(state, photos)
    seconds.training.append(taken)
  return seconds


def made_up(
  rng: np.random.Generator, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
  """Random images or codes; zeros for other integers, such as labels."""
  if dtype == np.uint8:
    return rng.integers(0, 256, shape, np.uint8)
  if not np.issubdtype(dtype, np.floating):
    return np.zeros(shape, dtype)
  return rng.uniform(-1, 1, shape).astype(dtype)


class _KeepsNothing:
  """A checkpointer that writes nothing."""

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    pass

  def wait(self) -> None:
    pass


def _median(values: list[float]) -> float | None:
  """The median; None of nothing."""
  return statistics.median(values) if values else None


def _rate(batch: int, seconds: list[float]) -> float | None:
  """Images per second; None if nothing was timed."""
  return batch / statistics.median(seconds) if seconds else None


def _quartiles(values: list[float]) -> list[float] | None:
  """The first and the third quartile; None for fewer than two values."""
  if len(values) < 2:
    return None
  first, _, third = statistics.quantiles(values, n=4)
  return [first, third]


def _scalar(value: int, like: jax.Array) -> jax.Array:
  """A number of the type and placement of `like`."""
  return jax.device_put(np.asarray(value, like.dtype), like.sharding)


def _peak_memory() -> tuple[int, str]:
  """Peak memory in bytes: of a device if it tells, else of the process."""
  stats = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'], 'device'
  unit = 1 if sys.platform == 'darwin' else 1024
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return used * unit, 'process'
