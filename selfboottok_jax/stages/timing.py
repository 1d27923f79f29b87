"""Clocks for a training step, the loop around it and its data."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax.stages.programs import TrainPrograms
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import loop, sharding
from selfboottok_jax.training.state import TrainState

Batches = Iterator[dict[str, np.ndarray]]

# Distinct host batches that the loop is fed without a pipeline.
_HOST_BATCHES = 4


class Seconds(NamedTuple):
  """Per step, a number for each round.

  Attributes:
    model: of the compiled step alone.
    loop: of the loop around it, on batches that cost nothing.
    data: of the pipeline alone; empty without data.
    training: of the loop on the pipeline's batches; empty without data.
  """

  model: list[float]
  loop: list[float]
  data: list[float]
  training: list[float]


class Timed:
  """Seconds per step of what makes up a training, `steps` at a time."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    step_fn: TrainPrograms,
    frozen: PyTree,
    mesh: Mesh,
    steps: int,
  ):
    """Makes a few host batches, one of which goes to the devices."""
    self._step_fn, self._frozen, self._mesh = step_fn, frozen, mesh
    self._steps, self._log_every = steps, config.train.log_every
    threads, workers = config.data.num_threads, config.data.num_workers
    self._ahead = 2 * max(2, threads) * max(1, workers)
    rng = np.random.default_rng(0)
    local = config.data.batch_size // jax.process_count()
    self._batches = [
      {
        name: _made_up(rng, (local, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in step_fn.batch.items()
      }
      for _ in range(_HOST_BATCHES)
    ]
    self._placed = sharding.put_batch(self._batches[0], mesh)

  def model(self, state: TrainState) -> tuple[TrainState, float]:
    """The compiled step alone, on a batch that lies on the device."""
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
    """A training as it is, but for evaluations and checkpoints."""
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

  def data(self, batches: Batches) -> float:
    """The pipeline alone, up to the host's memory."""
    # What was prepared during the round before is not of this one.
    for _ in range(self._ahead):
      next(batches)
    count = max(self._steps, 2 * self._ahead)
    began = time.monotonic()
    for _ in range(count):
      next(batches)
    return (time.monotonic() - began) / count

  def made_up(self) -> Batches:
    """Endless host batches that cost nothing to make."""
    while True:
      yield from self._batches


def measure(
  timed: Timed, state: TrainState, rounds: int, photos: Batches | None
) -> Seconds:
  """Takes `rounds` of everything; the photographs' threads start after all."""
  seconds = Seconds([], [], [], [])
  # Caches and allocators get going outside the clock.
  state, _ = timed.model(state)
  state, _ = timed.loop(state, timed.made_up())
  for index in range(rounds):
    # Either goes first as often: a drift of the machine cancels.
    for inside in (False, True)[:: -1 if index % 2 else 1]:
      if inside:
        state, taken = timed.loop(state, timed.made_up())
        seconds.loop.append(taken)
      else:
        state, taken = timed.model(state)
        seconds.model.append(taken)
  if photos is None:
    return seconds
  for _ in range(rounds):
    seconds.data.append(timed.data(photos))
    state, taken = timed.loop(state, photos)
    seconds.training.append(taken)
  return seconds


def _made_up(rng, shape, dtype) -> np.ndarray:
  """Numbers in [-1, 1]; whole ones, as labels, are 0."""
  if not np.issubdtype(dtype, np.floating):
    return np.zeros(shape, dtype)
  return rng.uniform(-1, 1, shape).astype(dtype)


class _KeepsNothing:
  """Stands where a training has its checkpointer."""

  def save(self, state, meta) -> None:
    pass

  def wait(self) -> None:
    pass
