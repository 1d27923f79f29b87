import contextlib
import functools
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.training import checkpointing, loop, sharding
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import state as state_lib


def _state():
  return state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params={'model': {'w': jnp.zeros(3)}},
    ema={},
    opt={'model': {'m': jnp.zeros(3)}},
    stats={},
  )


class Batches:
  """Batches that say their step; remembers which were taken."""

  def __init__(self, start=0):
    self.steps = itertools.count(start)
    self.taken = []

  def __iter__(self):
    return self

  def __next__(self):
    step = next(self.steps)
    self.taken.append(step)
    return {'image': np.full((8, 1), step, np.float32)}


class Recorder:
  """An evaluator that notes the steps at which it ran, and fails at some."""

  def __init__(self, fails_at=()):
    self.steps, self.fails_at = [], fails_at

  def run(self, state):
    self.steps.append(int(state.step))
    if self.steps[-1] in self.fails_at:
      raise errors.DataError('val/0.png is no image')
    yield 'score', float(state.params['model']['w'][0])


@jax.jit
def _update(state, batch):
  """Adds the batch's step to w, so that w tells which batches were seen."""
  w = state.params['model']['w'] + jnp.mean(batch['image'])
  return state.replace(step=state.step + 1, params={'model': {'w': w}})


def _step(state, frozen, batch, step):
  # The host's count of updates is the state's.
  assert step == int(state.step)
  new = _update(state, batch)
  return new, {'loss': new.params['model']['w'][0], 'scale': frozen}


def _run(workdir, *, steps=6, step_fn=_step, evaluator=None, batches=None,
         every=(1, 2, 3), kept=0, shown=None):  # fmt: skip
  """Trains in a workdir from its newest checkpoint on."""
  workdir, mesh = str(workdir), sharding.make_mesh()
  checkpointer = checkpointing.Checkpointer(workdir, max_to_keep=9)
  with contextlib.closing(checkpointer):
    state = jax.device_put(_state(), sharding.replicated(mesh))
    latest = checkpointing.latest_step(workdir)
    if latest is not None:
      state, _ = checkpointer.restore(state, latest)
    start = int(state.step)
    writer = logging_lib.MetricsWriter(
      workdir, start_step=start, pictures_kept=kept
    )
    with contextlib.closing(writer):
      return loop.run(
        state,
        step_fn,
        jnp.float32(1.0),
        batches or Batches(start),
        name='test',
        schedule=loop.Schedule(steps, *every),
        mesh=mesh,
        checkpointer=checkpointer,
        meta={'seed': 0},
        evaluators=[evaluator] if evaluator else [],
        evaluated=writer.evaluated,
        writer=writer,
        shown=shown or {'loss': 'loss'},
      )


def _saved(workdir):
  folder = workdir / checkpointing.FOLDER
  return sorted(int(path.name) for path in folder.iterdir())


def _logged(workdir, key):
  lines = (workdir / logging_lib.METRICS).read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return {r['step']: r[key] for r in records if key in r}


def test_things_happen_when_they_are_due(tmp_path):
  evaluator = Recorder()
  state = _run(tmp_path, steps=7, evaluator=evaluator, every=(3, 2, 5))
  assert int(state.step) == 7
  # The first step is logged, and what is saved; the last is measured too.
  assert list(_logged(tmp_path, 'loss')) == [1, 3, 5, 6, 7]
  assert evaluator.steps == [2, 4, 6, 7]
  # There is a checkpoint before every evaluation.
  assert _saved(tmp_path) == [2, 4, 5, 6, 7]
  # After step n the batches 0 to n - 1 were seen.
  losses = _logged(tmp_path, 'loss')
  assert losses == {n: n * (n - 1) / 2 for n in (1, 3, 5, 6, 7)}
  scores = _logged(tmp_path, 'val/score')
  assert scores == {n: n * (n - 1) / 2 for n in (2, 4, 6, 7)}
  assert set(_logged(tmp_path, 'images_per_second')) == set(losses)


class Painter:
  """An evaluator that yields a picture beside a number."""

  def run(self, state):
    yield 'score', float(state.step)
    yield 'grids', np.full((4, 4, 3), int(state.step), np.uint8)


def test_pictures_of_evaluations_are_written(tmp_path):
  _run(tmp_path, steps=6, evaluator=Painter(), every=(1, 2, 0), kept=2)
  names = sorted(path.name for path in (tmp_path / 'grids').iterdir())
  assert names == ['4.png', '6.png']
  assert list(_logged(tmp_path, 'val/score')) == [2, 4, 6]


def test_progress_shows_what_it_is_told_and_the_newest_evaluation(
  tmp_path, capsys
):
  shown = {'scale': 'scale', 'val score': 'val/score'}
  arguments = {'every': (1, 2, 0), 'evaluator': Painter(), 'shown': shown}
  _run(tmp_path, steps=3, **arguments)
  _run(tmp_path, steps=4, **arguments)
  lines = [
    line.split('  images/s')[0]
    for line in capsys.readouterr().err.splitlines()
    if 'images/s' in line
  ]
  assert lines == [
    'test: step 1/3  scale 1',
    'test: step 2/3  scale 1',
    'test: step 3/3  scale 1  val score 2',
    # Of the session before.
    'test: step 4/4  scale 1  val score 3',
  ]


def test_zero_means_only_at_the_end():
  schedule = loop.Schedule(5, 0, 0, 0)
  assert [n for n in range(6) if schedule.due(n, 0)] == [5]
  assert [n for n in range(6) if schedule.due(n, 2)] == [2, 4, 5]


def _stopping(at, number):
  def step_fn(state, frozen, batch, step):
    new, metrics = _step(state, frozen, batch, step)
    if int(new.step) == at:
      os.kill(os.getpid(), number)
    return new, metrics

  return step_fn


@pytest.mark.parametrize(
  'number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_a_stopped_run_is_saved_and_continues(tmp_path, number):
  handler = signal.getsignal(number)
  batches = Batches()
  with pytest.raises(loop.Interrupted, match='stopped at step 4 of 9'):
    _run(
      tmp_path,
      steps=9,
      step_fn=_stopping(4, number),
      batches=batches,
      every=(3, 0, 0),
    )
  assert signal.getsignal(number) == handler
  assert batches.taken == [0, 1, 2, 3]
  assert _saved(tmp_path) == [4]
  rest = Batches(4)
  state = _run(tmp_path, steps=9, batches=rest, every=(3, 0, 0))
  assert rest.taken == [4, 5, 6, 7, 8]
  assert float(state.params['model']['w'][0]) == sum(range(9))
  # The log is that of an unbroken run.
  assert _logged(tmp_path, 'loss') == {n: sum(range(n)) for n in (1, 3, 6, 9)}


def test_a_finished_run_does_nothing(tmp_path):
  _run(tmp_path, steps=2, evaluator=Recorder())
  evaluator, batches = Recorder(), Batches(2)
  state = _run(tmp_path, steps=2, evaluator=evaluator, batches=batches)
  assert int(state.step) == 2
  assert not evaluator.steps
  assert not batches.taken


@pytest.mark.parametrize('log_every', [3, 100])
def test_divergence_names_the_steps_and_saves_nothing(tmp_path, log_every):
  def step_fn(state, frozen, batch, step):
    new, metrics = _step(state, frozen, batch, step)
    if int(new.step) >= 5:
      metrics['scale'] = jnp.float32(np.nan)
    return new, metrics

  with pytest.raises(loop.DivergedError, match='scale .* steps 4 to 6;'):
    _run(tmp_path, steps=20, step_fn=step_fn, every=(log_every, 0, 3))
  # Earlier lines of the log stay.
  assert _saved(tmp_path) == [3]
  assert list(_logged(tmp_path, 'loss')) == [1, 3]


@pytest.mark.parametrize('fails_at', [4, 6])
def test_an_evaluation_that_fails_costs_no_update(tmp_path, fails_at):
  whole = tmp_path / 'whole'
  _run(whole, evaluator=Recorder(), every=(1, 2, 0))
  broken = Recorder(fails_at=[fails_at])
  run = tmp_path / 'broken'
  with pytest.raises(errors.DataError, match='val/0.png'):
    _run(run, evaluator=broken, every=(1, 2, 0))
  assert _saved(run)[-1] == fails_at
  assert list(_logged(run, 'loss')) == list(range(1, fails_at + 1))
  # Once more, until the picture is replaced: what is missing is made up for.
  with pytest.raises(errors.DataError, match='val/0.png'):
    _run(run, evaluator=broken, every=(1, 2, 0))
  mended, batches = Recorder(), Batches(fails_at)
  _run(run, evaluator=mended, batches=batches, every=(1, 2, 0))
  assert mended.steps == list(range(fails_at, 7, 2))
  assert batches.taken == list(range(fails_at, 6))
  for key in ('loss', 'val/score'):
    assert _logged(run, key) == _logged(whole, key)
  lines = (run / logging_lib.METRICS).read_text().splitlines()
  # None is there twice either.
  assert len(lines) == 6 + 3
  again = Recorder()
  _run(run, evaluator=again, every=(1, 2, 0))
  assert not again.steps


def test_who_stops_is_saved_before_and_evaluated_after(tmp_path):
  evaluator = Recorder()
  arguments = {'steps': 6, 'every': (3, 2, 0)}
  with pytest.raises(loop.Interrupted, match='step 4 of 6'):
    _run(
      tmp_path,
      evaluator=evaluator,
      step_fn=_stopping(4, signal.SIGTERM),
      **arguments,
    )
  assert evaluator.steps == [2]
  assert _saved(tmp_path) == [2, 4]
  _run(tmp_path, evaluator=evaluator, **arguments)
  assert evaluator.steps == [2, 4, 6]
  assert list(_logged(tmp_path, 'val/score')) == [2, 4, 6]
  assert list(_logged(tmp_path, 'loss')) == [1, 3, 6]


def test_a_terminal_that_hangs_up_twice_kills_nothing(tmp_path):
  def step_fn(state, frozen, batch, step):
    new, metrics = _step(state, frozen, batch, step)
    if int(new.step) == 3:
      os.kill(os.getpid(), signal.SIGHUP)
      os.kill(os.getpid(), signal.SIGHUP)
    return new, metrics

  before = signal.getsignal(signal.SIGHUP)
  with pytest.raises(loop.Interrupted, match='step 3 of 6'):
    _run(tmp_path, step_fn=step_fn, every=(1, 0, 0))
  assert signal.getsignal(signal.SIGHUP) == before


def test_what_nohup_started_outlives_its_terminal(tmp_path):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    state = _run(tmp_path, step_fn=_stopping(3, signal.SIGHUP))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)
  assert int(state.step) == 6


def test_a_failing_step_leaves_the_handlers_as_they_were(tmp_path):
  def step_fn(state, frozen, batch, step):
    raise RuntimeError('out of memory')

  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with pytest.raises(RuntimeError, match='out of memory'):
    _run(tmp_path, step_fn=step_fn)
  assert [
    signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
  ] == before


class _Queue:
  """A device that computes a step only when somebody waits for it."""

  def __init__(self, monkeypatch):
    self.dispatched = self.computed = 0
    # Steps that were not computed yet, whenever a batch is asked for.
    self.waiting = []
    for name in ('block_until_ready', 'device_get'):
      wait = functools.partial(self._wait, getattr(jax, name))
      monkeypatch.setattr(loop.jax, name, wait)

  def step_fn(self, state, frozen, batch, step):
    del frozen, batch
    self.dispatched += 1
    state = state.replace(step=jnp.int32(step + 1))
    return state, {'loss': jnp.float32(step + 1)}

  def batches(self):
    while True:
      self.waiting.append(self.dispatched - self.computed)
      yield {'image': np.zeros((8, 1), np.float32)}

  def _wait(self, wait, tree):
    if isinstance(tree, dict) and 'loss' in tree:
      self.computed = max(self.computed, int(tree['loss']))
    return wait(tree)


@pytest.mark.parametrize('log_every', [1, 4, 0])
def test_the_host_is_two_steps_ahead_at_most(tmp_path, monkeypatch, log_every):
  queue = _Queue(monkeypatch)
  _run(
    tmp_path,
    steps=9,
    step_fn=queue.step_fn,
    batches=queue.batches(),
    every=(log_every, 0, 0),
  )
  assert queue.computed == queue.dispatched == 9
  assert max(queue.waiting) <= loop.RUN_AHEAD
  # And it is ahead: the next batch is placed while steps are computed, however
  # often the log is written.
  assert min(queue.waiting[1:]) >= 1
  if not log_every:
    assert queue.waiting[3:] == [loop.RUN_AHEAD] * 6
