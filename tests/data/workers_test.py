import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import workers
from tests import processes
from tests.data import trees

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Count:
  """Batches that say which worker made them, and which of its own it is."""

  length: int
  size: int = 1000
  fails_at: int = -1

  def __call__(self, index):
    for number in range(self.length):
      if number == self.fails_at:
        raise errors.DataError(f'picture {number} is no image')
      yield {
        'image': np.full((self.size,), 10 * index + number, np.uint8),
        'label': np.array([index, number], np.int32),
        'names': [f'{index}/{number}'],
      }


def _workers(make, count=2, batch_bytes=2000):
  return contextlib.closing(
    workers.Workers(make, count=count, batch_bytes=batch_bytes)
  )


def _processes(batches):
  return [worker._process for worker in batches._workers]


def test_workers_take_turns_and_end_together():
  with _workers(Count(3)) as batches:
    # More than there are slots: none may be written while it is kept.
    kept = list(batches)
    labels = np.stack([batch['label'] for batch in kept])
    np.testing.assert_array_equal(
      labels, [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]
    )
    for (index, number), batch in zip(labels, kept, strict=True):
      assert batch['names'] == [f'{index}/{number}']
      np.testing.assert_array_equal(batch['image'], 10 * index + number)
    # They are closed: there will be no more.
    assert list(batches) == []
  np.testing.assert_array_equal(kept[-1]['image'], 12)


def test_batches_are_read_where_they_were_written():
  with _workers(Count(100), count=1) as batches:
    (worker,) = batches._workers
    first, second, third = (next(batches)['image'] for _ in range(3))
    memory = np.frombuffer(worker._memory.map, np.uint8)
    shared = [np.shares_memory(x, memory) for x in (first, second, third)]
    # One slot is left to the worker.
    assert shared == [True] * (workers.SLOTS - 1) + [False]
    assert first.ctypes.data % 64 == 0
    part = first[10:20]
    del first
    gc.collect()
    assert len(worker._lent) == 2
    del part, second
    gc.collect()
    assert not worker._lent
    np.testing.assert_array_equal(third, 2)
    for number in range(3, 100):
      np.testing.assert_array_equal(next(batches)['image'], number)


@pytest.mark.faults
def test_memory_without_a_name_is_had_everywhere(monkeypatch):
  monkeypatch.setattr(workers, 'HAS_MEMFD', False)
  with _workers(Count(3), count=1) as batches:
    assert [batch['image'][0] for batch in batches] == [0, 1, 2]


@pytest.mark.faults
def test_what_does_not_fit_is_sent_all_the_same():
  size = 2**20
  with _workers(Count(2, size), count=1) as batches:
    assert [batch['image'].sum() for batch in batches] == [0, size]


@pytest.mark.faults
@pytest.mark.parametrize('fails_at', [0, 1])
def test_an_error_of_a_worker_is_raised_here(fails_at):
  with _workers(Count(5, fails_at=fails_at)) as batches:
    processes = _processes(batches)
    for _ in range(2 * fails_at):
      next(batches)
    with pytest.raises(errors.DataError, match=f'^picture {fails_at} is no'):
      next(batches)
    assert not any(process.is_alive() for process in processes)


def _unportable(index):
  class Odd(Exception):  # noqa: N818
    def __init__(self, one, two):
      super().__init__(one)

  yield {}
  raise Odd('of a kind', 2)


@pytest.mark.faults
def test_other_errors_say_where_they_come_from():
  with (
    _workers(_unportable, count=1) as batches,
    pytest.raises(RuntimeError, match=r"in a data worker: Odd\('of a kind'\)"),
  ):
    list(batches)


@pytest.mark.faults
def test_nothing_is_left_when_they_are_closed():
  with _workers(Count(10**6)) as batches:
    next(batches)
    started = _processes(batches)
  assert not any(process.is_alive() for process in started)
  batches.close()


@pytest.mark.parametrize(
  ('number', 'said'),
  [
    (signal.SIGKILL, r'was killed \(SIGKILL\), .*; lower data.num_workers'),
    pytest.param(
      signal.SIGSEGV, r'was killed \(SIGSEGV\)', marks=pytest.mark.faults
    ),
  ],
)
def test_a_killed_worker_is_one_error(number, said):
  with _workers(Count(10**6)) as batches:
    next(batches)
    processes = _processes(batches)
    os.kill(processes[1].pid, number)
    began = time.monotonic()
    with pytest.raises(errors.DataError, match=said):
      for _ in batches:
        pass
    # Not a bound on its speed: a hang would be for ever.
    assert time.monotonic() - began < 30
    assert not any(process.is_alive() for process in processes)


def _exits(index):
  sys.exit(3)


def _leaves(index):
  os._exit(3)


@pytest.mark.faults
def test_a_worker_that_ends_by_itself_is_told_apart():
  with (
    _workers(_leaves) as batches,
    pytest.raises(errors.DataError, match=r'by itself \(exit code 3\), for a'),
  ):
    next(batches)
  with _workers(_exits) as batches, pytest.raises(SystemExit):
    next(batches)


@pytest.mark.faults
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_workers_leave_signals_to_the_training(name):
  with _workers(Count(10**6)) as batches:
    # From their first moment on, before they can have run anything.
    for _ in range(2):
      for process in _processes(batches):
        os.kill(process.pid, getattr(signal, name))
      for _ in range(2 * workers.SLOTS + 2):
        next(batches)
    assert all(process.is_alive() for process in _processes(batches))


_ORPHANS = """
import time
from selfboottok_jax import data
from tests.data import workers_test

if __name__ == '__main__':
  source = data.open_source('auto', {path!r}, 'train', 8)
  batches = data.make_train_dataset(
    source, batch_size=4, image_size=8, seed=0, num_workers=2)
  next(batches)
  print(*(p.pid for p in workers_test._processes(batches._box[0])), flush=True)
  time.sleep(600)
"""


@pytest.mark.faults
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(number, tmp_path):
  trees.write(tmp_path / 'data', *(f'train/{i}.png' for i in range(8)))
  trees.write(tmp_path / 'data', 'val/0.png')
  program = tmp_path / 'program.py'
  program.write_text(_ORPHANS.format(path=str(tmp_path / 'data')))
  with subprocess.Popen(
    [sys.executable, str(program)],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(processes.runs(pid) for pid in pids)
    process.send_signal(number)
    assert process.wait(60) == -number
    assert processes.ended(pids)
    # The tracker of named memory, which ends last, has nothing to say.
    assert process.stderr.read() == ''


class Large:
  """Pictures that take most of the time to make."""

  class_names, fingerprint, max_scale = (), '', 1.0

  def __len__(self):
    return 1000

  def __getitem__(self, index):
    return {'image': np.full((64, 64, 3), index % 256, np.uint8), 'label': 0}


def test_the_memory_of_batches_is_as_large_as_they_are():
  batches = data.make_train_dataset(
    Large(), batch_size=8, image_size=64, seed=0, num_workers=1, num_threads=0
  )
  with contextlib.closing(batches):
    batch = next(batches)
    (worker,) = batches._box[0]._workers
    memory = np.frombuffer(worker._memory.map, np.uint8)
    assert np.shares_memory(batch['image'], memory)
    assert np.shares_memory(batch['label'], memory)


_EPOCHS = """
import contextlib
import json
import os
import sys

from selfboottok_jax import data
from tests import processes

BATCH = 16


def measure(path, keep, workers):
  source = data.open_source('auto', path, 'train', 96)
  steps = len(source) // BATCH
  batches = data.make_train_dataset(
    source, batch_size=BATCH, image_size=96, seed=0, num_threads=1,
    num_workers=workers)
  kept, sizes = [], []
  with contextlib.closing(batches):
    # What is prepared ahead and what allocators keep for later come first.
    for epoch in range(4):
      for _ in range(steps):
        batch = next(batches)
        if keep:
          kept.append(batch)
      pids = [os.getpid(), *processes.workers(os.getpid())]
      assert len(pids) == 1 + workers
      sizes.append([processes.resident(pid) for pid in pids])
  print(json.dumps({'epoch': steps * BATCH * 3 * 96**2, 'sizes': sizes}))


if __name__ == '__main__':
  measure(sys.argv[1], sys.argv[2] == 'keep', int(sys.argv[3]))
"""


def _grown(tmp_path, keep, number):
  """Bytes that each process grew by over three epochs, and those of one."""
  for i in range(160):
    file = tmp_path / 'data' / 'train' / f'{i}.jpg'
    file.parent.mkdir(parents=True, exist_ok=True)
    trees.picture(i, (160, 120)).save(file, 'JPEG')
  trees.write(tmp_path / 'data', 'val/0.png')
  program = tmp_path / 'program.py'
  program.write_text(_EPOCHS)
  done = subprocess.run(
    [sys.executable, str(program), str(tmp_path / 'data'), keep, str(number)],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  record = json.loads(done.stdout)
  first, *_, last = record['sizes']
  return [b - a for a, b in zip(first, last, strict=True)], record['epoch']


@pytest.mark.faults
@pytest.mark.parametrize('number', [0, 2])
def test_memory_is_flat_over_three_epochs(number, tmp_path):
  grown, epoch = _grown(tmp_path, 'drop', number)
  # Three epochs of batches went by: less than a quarter of one stayed, in this
  # process and in every worker.
  assert max(grown) < epoch / 4, (grown, epoch)


@pytest.mark.faults
@pytest.mark.long
def test_memory_that_is_kept_would_be_seen(tmp_path):
  (grown,), epoch = _grown(tmp_path, 'keep', 0)
  assert grown > 2.5 * epoch
