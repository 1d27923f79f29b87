"""The training loop, which is the same for every task."""

import collections
import dataclasses
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import processes, sharding
from selfboottok_jax.training import state as state_lib

# Steps that the host may be ahead of the one that the devices compute. Each
# keeps a batch in their memory: with the next step and its batch waiting there,
# and one more on its way, the devices never wait for the host.
RUN_AHEAD = 2


@runtime_checkable
class Evaluator(Protocol):
  """Anything that measures a state."""

  def run(
    self, state: state_lib.TrainState
  ) -> Iterator[tuple[str, float | UInt8[np.ndarray, 'h w 3']]]:
    """Yields (name, value) of each measure, on all processes alike.

    A value is a number, or a picture.
    """


@runtime_checkable
class StateSaver(Protocol):
  """Anything that keeps states; `checkpointing.Checkpointer` is one."""

  def save(self, state: state_lib.TrainState, meta: dict[str, Any]) -> None:
    """Saves a state, in the background perhaps.

    Must not need the arrays of `state` any more when it returns.
    """

  def wait(self) -> None:
    """Waits until everything that was saved is kept."""


class DivergedError(Exception):
  """A loss or a gradient norm is no longer finite."""


class Interrupted(Exception):  # noqa: N818 - it reports, nothing went wrong.
  """The run was asked to stop; its state is saved."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The length of a training and the intervals of its events, in updates.

  An interval of 0 leaves only the last step, at which every event happens.

  Attributes:
    steps: length of the training.
    log_every: interval between lines of the log.
    evaluate_every: interval between evaluations.
    save_every: interval between checkpoints. There is one before every
      evaluation too.
  """

  steps: int
  log_every: int
  evaluate_every: int
  save_every: int

  def due(self, step: int, every: int) -> bool:
    """Returns True if an event with the interval `every` is due at `step`."""
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
  checkpointer: StateSaver,
  meta: Mapping[str, Any],
  evaluators: Sequence[Evaluator] = (),
  evaluated: bool = True,
  writer: logging_lib.MetricsWriter | None = None,
  shown: Mapping[str, str] = types.MappingProxyType({'loss': 'loss'}),
) -> state_lib.TrainState:
  """Trains from `state` to `schedule.steps`.

  Args:
    state: restored or fresh, placed on `mesh`; it is donated.
    step_fn: the compiled train step, called with (state, frozen, batch, number
      of updates made so far).
    frozen: parameters of frozen networks, placed on `mesh`.
    batches: this process's share of batches, the first of which is that of
      state.step.
    name: shown beside the progress.
    schedule: when to log, evaluate and save.
    mesh: devices that batches are placed on.
    checkpointer: saves the states.
    meta: values saved beside each state.
    evaluators: measure the state whenever an evaluation is due.
    evaluated: False if `state` was saved by a run that ended before it was
      evaluated: that is made up for, if it is due.
    writer: writes metrics; None on all processes but the first.
    shown: names of the metrics in progress lines, by what they are called
      there; of evaluations the newest are shown.

  Returns:
    The state after the last update.

  Raises:
    DivergedError: a metric is no longer finite; the message has the range of
      steps in which it happened. Earlier checkpoints stay.
    Interrupted: on SIGINT, SIGTERM or SIGHUP, after the state was saved.
  """
  step = start = int(state.step)
  progress = logging_lib.Progress(
    schedule.steps, start=start, name=name, silent=jax.process_index() > 0
  )
  clock = _Clock(start)
  newest_evaluation = dict(writer.newest_evaluation) if writer else {}

  def flush(
    pending: _Pending | None, writer: logging_lib.MetricsWriter | None
  ) -> None:
    if values := _flush(pending, clock, writer):
      values = newest_evaluation | values
      assert pending is not None
      progress.show(
        pending.step,
        {
          **{
            label: f'{values[name]:.4g}'
            for label, name in shown.items()
            if name in values
          },
          'images/s': f'{values["images_per_second"]:.1f}',
          'data wait': f'{values["data_wait"]:.0%}',
        },
      )

  # `newest` are the metrics of the last step; `pending` is the same where they
  # are to be logged, and None once they are.
  pending: _Pending | None = None
  newest: _Pending | None = None
  dispatched: collections.deque[Mapping[str, jax.Array]] = collections.deque()
  with _StopRequest() as stop:
    try:
      while True:
        stopping = stop.agreed(schedule.due(step, schedule.log_every))
        evaluating = bool(evaluators) and (
          schedule.due(step, schedule.evaluate_every)
          and (step > start or not evaluated)
        )
        if step > start and (
          stopping or evaluating or schedule.due(step, schedule.save_every)
        ):
          # No state is saved whose own metrics were not seen to be finite. A
          # stop adds no line to the log: it is that of an unbroken run.
          planned = pending is newest or schedule.due(step, schedule.save_every)
          flush(newest, writer if planned else None)
          pending = None
          # A run that goes on from this state has the lines before it.
          if writer is not None:
            writer.flush()
          checkpointer.save(state, dict(meta))
        # An evaluation may fail, or run out of memory: the state is on disk by
        # then. Who stops has no time for it; the run that goes on sees in the
        # log that it is missing, and makes it then.
        if evaluating and (not stopping or step >= schedule.steps):
          began = time.monotonic()
          checkpointer.wait()
          newest_evaluation |= _evaluate(
            state, step, evaluators, progress, writer
          )
          clock.pause(time.monotonic() - began)
        if step >= schedule.steps:
          break
        # A stop at the last step changes nothing: the run is complete.
        if stopping:
          raise Interrupted(f'stopped at step {step} of {schedule.steps}')
        waited = time.monotonic()
        host_batch = next(batches)
        clock.wait(time.monotonic() - waited)
        # The devices still compute the step before: the batch is there when
        # they need it.
        batch = sharding.put_batch(dict(host_batch), mesh)
        # The old state is donated and must not be read again. The call returns
        # before the device has computed anything.
        state, metrics = step_fn(state, frozen, batch, step)
        step += 1
        progress.advance()
        # The last interval's metrics are fetched only now that the next step is
        # dispatched: the device never waits for the log.
        flush(pending, writer)
        pending = None
        # The global batch: every process counts all images.
        newest = _Pending(step, metrics, jax.tree.leaves(batch)[0].shape[0])
        if schedule.due(step, schedule.log_every) or step == 1:
          pending = newest
        dispatched.append(metrics)
        if len(dispatched) > RUN_AHEAD:
          # Or a host that is faster would fill their memory with batches.
          jax.block_until_ready(dispatched.popleft())
      flush(pending, writer)
    finally:
      # Saves that were begun are finished, also after an error.
      checkpointer.wait()
      progress.close()
  return state


@dataclasses.dataclass(frozen=True)
class _Pending:
  """Metrics of a dispatched step, which may still be being computed."""

  step: int
  metrics: Mapping[str, jax.Array]
  batch_size: int


class _Clock:
  """Measures rates since the last line of the log, without evaluations.

  Attributes:
    checked: the last step whose metrics were seen to be finite.
  """

  def __init__(self, step: int) -> None:
    self._step = self.checked = step
    self._began, self._waited = time.monotonic(), 0.0
    self._start = self._began

  def wait(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._waited += seconds

  def pause(self, seconds: float) -> None:
    """Excludes time from the rates."""
    # As if the interval had begun later.
    self._began += seconds

  def lap(self, step: int, batch_size: int) -> dict[str, float]:
    """Returns the rates of the interval that ends now, and begins another."""
    now = time.monotonic()
    elapsed = max(now - self._began, 1e-9)
    rates = {
      'images_per_second': (step - self._step) * batch_size / elapsed,
      'data_wait': min(self._waited / elapsed, 1.0),
      'seconds': now - self._start,
    }
    self._step, self._began, self._waited = step, now, 0.0
    return rates


def _flush(
  pending: _Pending | None,
  clock: _Clock,
  writer: logging_lib.MetricsWriter | None,
) -> dict[str, float]:
  """Fetches, checks and writes the metrics of an earlier step, if any.

  Returns:
    The metrics with the rates; {} if there are none that are new.

  Raises:
    DivergedError: a metric is not finite.
  """
  # A step that was checked before saving must not appear in the log twice.
  if pending is None or pending.step <= clock.checked:
    return {}
  # This waits for the step; one transfer fetches all metrics.
  values = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
  bad = sorted(k for k, v in values.items() if not np.isfinite(v))
  if bad:
    raise DivergedError(
      f'{", ".join(bad)} became non-finite in steps {clock.checked + 1} to '
      f'{pending.step}; begin in another --workdir with a lower '
      'optimizer.learning_rate or other train.seed'
    )
  clock.checked = pending.step
  values |= clock.lap(pending.step, pending.batch_size)
  if writer is not None:
    writer.write(pending.step, values)
  return values


def _evaluate(
  state: state_lib.TrainState,
  step: int,
  evaluators: Sequence[Evaluator],
  progress: logging_lib.Progress,
  writer: logging_lib.MetricsWriter | None,
) -> dict[str, float]:
  """Measures a state, and logs the values with the prefix 'val/'.

  Returns:
    The numbers, under those names.
  """
  # Without a writer too: evaluating is collective, logging is not.
  values: dict[str, float] = {}
  pictures: dict[str, UInt8[np.ndarray, 'h w 3']] = {}
  if evaluators:
    state = state_lib.gather_means(state)
  for evaluator in evaluators:
    for name, value in evaluator.run(state):
      if isinstance(value, np.ndarray):
        pictures[name] = value
      else:
        values[f'{logging_lib.EVALUATION}{name}'] = value
  if writer is not None:
    for name, picture in pictures.items():
      writer.write_picture(step, name, picture)
    if values:
      # Last: an evaluation that is in the log is whole.
      writer.write(step, values)
  if not values:
    return {}
  # Not those of single codebooks.
  shown = '  '.join(
    f'{name} {value:.4g}'
    for name, value in values.items()
    if not name.rpartition('_')[2].isdigit()
  )
  progress.note(f'step {step}  {shown}')
  return values


class _StopRequest:
  """Turns the first SIGINT, SIGTERM or SIGHUP into a request to stop.

  A second SIGINT or SIGTERM kills. A terminal that is closed often sends SIGHUP
  twice, by the kernel and by the shell: further ones do nothing.
  """

  def __init__(self) -> None:
    self.requested = False
    # Any: a handler is a function, a number or None.
    self._previous: dict[int, Any] = {}
    self._hangup: Any = None

  def agreed(self, due: bool) -> bool:
    """Returns True if any process was asked to stop, on all processes alike.

    A save is collective, so they must not begin it at different steps. Several
    processes exchange their requests only where `due`, as each exchange makes
    them wait for each other.
    """
    if jax.process_count() > 1 and not due:
      return False
    return processes.anywhere(self.requested)

  def __enter__(self) -> '_StopRequest':
    # Python allows signal handlers in the main thread alone.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
      # What nohup started is not to end with the terminal.
      if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        self._hangup = signal.signal(signal.SIGHUP, self._handle)
    return self

  def __exit__(self, *unused: object) -> None:
    self._restore()
    if self._hangup is not None:
      signal.signal(signal.SIGHUP, self._hangup)

  def _handle(self, *unused: object) -> None:
    # Nothing else here: the signal may have come in the middle of a step. With
    # the old handlers back, a second signal ends the process.
    self.requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
