"""The loop around the train step, the same for every task."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax.training import checkpointing, sharding
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import state as state_lib


@runtime_checkable
class Evaluator(Protocol):
  """Measures a state."""

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, float]]:
    """Yields (name, value)."""


class DivergedError(Exception):
  """A loss or a gradient norm is no longer finite."""


class Interrupted(Exception):  # noqa: N818 - it reports, nothing went wrong.
  """The run was asked to stop; its state is saved."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When things happen, in updates.

  Attributes:
    steps: length of the training.
    log_every: between lines of the log.
    evaluate_every: between evaluations; the last step is always evaluated.
    save_every: between checkpoints; the last step is always saved.
  """

  steps: int
  log_every: int
  evaluate_every: int
  save_every: int

  def due(self, step: int, every: int) -> bool:
    """Whether something that happens `every` so many updates is due."""
    return step == self.steps or (step > 0 and every > 0 and step % every == 0)


def run(
  state: state_lib.TrainState,
  step_fn: Callable[..., Any],
  frozen: PyTree,
  batches: Iterator[Mapping[str, np.ndarray]],
  *,
  name: str,
  schedule: Schedule,
  mesh: Mesh,
  checkpointer: checkpointing.Checkpointer,
  meta: Mapping[str, Any],
  evaluators: Sequence[Evaluator] = (),
  writer: logging_lib.MetricsWriter | None = None,
) -> state_lib.TrainState:
  """Trains from `state` to `schedule.steps`.

  Args:
    state: restored or fresh, placed on `mesh`; it is donated.
    step_fn: the compiled train step; takes the number of updates made so far
      after the batch.
    frozen: parameters of frozen networks, placed on `mesh`.
    batches: this process's share, beginning with the batch of state.step.
    name: shown beside the progress.
    schedule: when to log, evaluate and save.
    mesh: where batches go.
    checkpointer: where states go.
    meta: saved beside each state.
    evaluators: what is measured.
    writer: where metrics go; None on all processes but the first.

  Returns:
    The state after the last update.

  Raises:
    DivergedError: names the range of steps in which a metric left the finite
      numbers; the checkpoints before it stay.
    Interrupted: on SIGINT or SIGTERM, after the state was saved.
  """
  step = start = int(state.step)
  progress = logging_lib.Progress(
    schedule.steps, start=start, name=name, silent=jax.process_index() > 0
  )
  clock = _Clock(start)
  pending = newest = None
  with _StopRequest() as stop:
    try:
      while True:
        stopping = stop.agreed(schedule.due(step, schedule.log_every))
        # Evaluate before saving: a checkpoint means "everything up to here
        # was also measured", so a restart repeats neither.
        if step > start and schedule.due(step, schedule.evaluate_every):
          pending = _flush(pending, clock, progress, writer)
          began = time.monotonic()
          _evaluate(state, step, evaluators, progress, writer)
          clock.pause(time.monotonic() - began)
        if step > start and (
          stopping or schedule.due(step, schedule.save_every)
        ):
          # No state is saved whose own metrics were not seen to be finite. A
          # stop adds no line to the log: it is that of an unbroken run.
          planned = pending is newest or schedule.due(step, schedule.save_every)
          pending = _flush(newest, clock, progress, writer if planned else None)
          checkpointer.save(state, dict(meta))
        if step >= schedule.steps:
          break
        if stopping:
          raise Interrupted(f'stopped at step {step} of {schedule.steps}')
        waited = time.monotonic()
        host_batch = next(batches)
        clock.wait(time.monotonic() - waited)
        batch = sharding.put_batch(dict(host_batch), mesh)
        state, metrics = step_fn(state, frozen, batch, step)
        step += 1
        progress.advance()
        # Only now, with the next step dispatched, are the last interval's
        # numbers fetched: the device never waits for the log.
        pending = _flush(pending, clock, progress, writer)
        newest = _Pending(step, metrics, jax.tree.leaves(batch)[0].shape[0])
        if schedule.due(step, schedule.log_every) or step == 1:
          pending = newest
      _flush(pending, clock, progress, writer)
    finally:
      checkpointer.wait()
      progress.close()
  return state


@dataclasses.dataclass(frozen=True)
class _Pending:
  """Metrics of a dispatched step that nobody has looked at yet."""

  step: int
  metrics: Mapping[str, jax.Array]
  batch_size: int


class _Clock:
  """Rates since the last log line; evaluations do not count."""

  def __init__(self, step: int):
    self._step = self.checked = step
    self._began, self._waited = time.monotonic(), 0.0
    self._start = self._began

  def wait(self, seconds: float) -> None:
    self._waited += seconds

  def pause(self, seconds: float) -> None:
    self._began += seconds

  def lap(self, step: int, batch_size: int) -> dict[str, float]:
    now = time.monotonic()
    elapsed = max(now - self._began, 1e-9)
    rates = {
      'images_per_second': (step - self._step) * batch_size / elapsed,
      'data_wait': min(self._waited / elapsed, 1.0),
      'seconds': now - self._start,
    }
    self._step, self._began, self._waited = step, now, 0.0
    return rates


def _flush(pending, clock, progress, writer) -> None:
  """Fetches, checks and writes the metrics of an earlier step, if any."""
  if pending is None or pending.step <= clock.checked:
    return
  values = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
  bad = sorted(k for k, v in values.items() if not np.isfinite(v))
  if bad:
    raise DivergedError(
      f'{", ".join(bad)} became non-finite in steps {clock.checked + 1} to '
      f'{pending.step}; begin in another --workdir with a lower '
      'optimizer.learning_rate or other train.seed'
    )
  clock.checked = pending.step
  rates = clock.lap(pending.step, pending.batch_size)
  if writer is not None:
    writer.write(pending.step, values | rates)
  progress.show(
    pending.step,
    {
      'loss': f'{values["loss"]:.4f}',
      'images/s': f'{rates["images_per_second"]:.1f}',
      'data wait': f'{rates["data_wait"]:.0%}',
    },
  )


def _evaluate(state, step, evaluators, progress, writer) -> None:
  values = {}
  for evaluator in evaluators:
    values |= {f'val/{name}': value for name, value in evaluator.run(state)}
  if not values:
    return
  if writer is not None:
    writer.write(step, values)
  shown = '  '.join(f'{k} {v:.4g}' for k, v in values.items())
  progress.note(f'step {step}  {shown}')


class _StopRequest:
  """Turns the first SIGINT or SIGTERM into a request; a second one kills."""

  def __init__(self):
    self.requested = False
    self._previous = {}

  def agreed(self, due: bool) -> bool:
    """Whether any process was asked to stop, the same answer on all.

    Several processes ask each other only where `due`: a save is collective,
    and they must not begin it at different steps.
    """
    if jax.process_count() == 1:
      return self.requested
    if not due:
      return False
    flags = multihost_utils.process_allgather(np.asarray(self.requested))
    return bool(np.any(flags))

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused):
    self._restore()

  def _handle(self, *unused):
    self.requested = True
    self._restore()

  def _restore(self):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
