"""Trainings with data workers that are stopped, or whose data fails.

Real processes, on a folder of photographs: nothing is left of them, what was
trained is saved, and the user reads one line.
"""

import contextlib
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from selfboottok_jax.training import checkpointing
from tests import processes
from tests.launch import commands, logs

pytestmark = [
  pytest.mark.faults,
  pytest.mark.skipif(
    not processes.PROC.is_dir(), reason='the system shows no processes'
  ),
]
WORKERS = 2
UPDATE, DATA = 'generator: step ', ('data: ', 'split: ', 'skipped: ')


@pytest.fixture
def arguments(runs, photos, tmp_path):
  return [
    '--config=tests/launch/tiny.py:generator',
    f'--config.tokenizer={runs / "tokenizer"}',
    '--config.data.source=auto',
    f'--config.data.path={photos}',
    f'--config.data.num_workers={WORKERS}',
    '--config.train.steps=1000000',
    '--config.evaluation.every=0',
    '--config.checkpoint.every=0',
    f'--workdir={tmp_path / "run"}',
  ]


@contextlib.contextmanager
def _start(arguments, **options) -> Iterator[subprocess.Popen]:
  """A training in a process group of its own; a failed test leaves none."""
  training = subprocess.Popen(
    [sys.executable, '-m', 'launch.train', *arguments],
    cwd=commands.ROOT,
    env=commands.environment(),
    stdout=subprocess.PIPE,
    text=True,
    **({'stderr': subprocess.PIPE, 'start_new_session': True} | options),
  )
  try:
    yield training
    training.wait(600)
  finally:
    training.kill()
    training.wait()
    for stream in (training.stdout, training.stderr):
      if stream:
        stream.close()


def _wait_for_updates(stream, count=3) -> list[str]:
  """The lines of the first updates; what is said of the data comes before."""
  lines = []
  while len(lines) < count:
    line = stream.readline().strip()
    assert line.startswith((UPDATE, *DATA)), line
    if line.startswith(UPDATE):
      lines.append(line)
  return lines


def _assert_one_error(lines, beginning) -> str:
  *log, last = lines
  assert all(line.startswith((UPDATE, *DATA)) for line in log), lines
  assert last.startswith(f'error: {beginning}'), lines
  return last


@pytest.mark.parametrize(
  'name',
  [
    'SIGINT',
    'SIGTERM',
    pytest.param('SIGHUP', marks=pytest.mark.long),
  ],
)
def test_a_signal_for_all_processes_saves_and_leaves_nothing(
  name, arguments, tmp_path
):
  last = 0
  # The second time the run goes on.
  for _ in range(2):
    with _start(arguments) as training:
      lines = _wait_for_updates(training.stderr)
      assert lines[0].startswith(f'generator: step {last + 1}/')
      workers = processes.workers(training.pid)
      assert len(workers) == WORKERS
      # What has no name is gone with the last process that has it.
      for pid in (training.pid, *workers):
        assert not processes.named_memory(pid)
      os.killpg(training.pid, getattr(signal, name))
      lines += training.stderr.read().splitlines()
    assert training.returncode == 130, lines
    last = checkpointing.latest_step(str(tmp_path / 'run'))
    said = _assert_one_error(lines, f'stopped at step {last} of 1000000')
    assert 'the same command continues' in said
    assert processes.ended([*workers, training.pid])
  steps = [record['step'] for record in logs.read(tmp_path / 'run')]
  assert steps == list(range(1, last + 1))


@pytest.mark.long
def test_a_closed_terminal_saves(arguments, tmp_path):
  """As when a window is closed, or a connection breaks."""
  screen, terminal = pty.openpty()
  # Or a bar would have no columns.
  termios.tcsetwinsize(terminal, (24, 100))
  with _start(
    arguments,
    stderr=terminal,
    stdin=terminal,
    # The terminal of a session of its own, as a shell has.
    start_new_session=False,
    preexec_fn=lambda: os.login_tty(0) if hasattr(os, 'login_tty') else None,
  ) as training:
    os.close(terminal)
    shown = b''
    # A bar, which does not show every step.
    while not re.search(rb'[ |]([1-9]\d*)/1000000', shown):
      shown += os.read(screen, 1024)
    workers = processes.workers(training.pid)
    assert len(workers) == WORKERS
    os.close(screen)
    assert training.wait(120) == 130
  assert checkpointing.latest_step(str(tmp_path / 'run')) >= 1
  assert processes.ended([*workers, training.pid])


def test_a_killed_worker_ends_the_training_in_one_line(arguments, tmp_path):
  with _start(arguments) as training:
    lines = _wait_for_updates(training.stderr)
    workers = processes.workers(training.pid)
    os.kill(workers[0], signal.SIGKILL)
    began = time.monotonic()
    lines += training.stderr.read().splitlines()
    seconds = time.monotonic() - began
  assert training.returncode == 1
  said = _assert_one_error(lines, 'a data worker was killed (SIGKILL)')
  assert 'lower data.num_workers' in said
  # It waits for nobody: far below any timeout.
  assert seconds < 20
  assert processes.ended([*workers, training.pid])


def _damage(picture: pathlib.Path) -> None:
  picture.write_bytes(picture.read_bytes()[:50])


def test_a_damaged_picture_is_one_line_from_a_worker(
  arguments, photos, tmp_path
):
  damaged = tmp_path / 'damaged'
  shutil.copytree(photos, damaged)
  picture = min((damaged / 'train' / 'dog').iterdir())
  _damage(picture)
  with _start([*arguments, f'--config.data.path={damaged}']) as training:
    lines = training.stderr.read().splitlines()
  assert training.returncode == 1
  # Statistics of the codes read the pictures before the first update.
  assert f'train/dog/{picture.name} is no image' in _assert_one_error(lines, '')
  assert processes.ended([training.pid])


@pytest.mark.long
def test_a_damaged_held_out_picture_is_found_before_anything_is_written(
  server, arguments, photos, tmp_path
):
  damaged = tmp_path / 'damaged'
  shutil.copytree(photos, damaged)
  picture = min((damaged / 'val' / 'cat').iterdir())
  _damage(picture)
  result = server.run('train', *arguments, f'--config.data.path={damaged}')
  assert f'val/cat/{picture.name} is no image' in result.error
  assert result.err.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_a_picture_that_goes_bad_costs_no_update(
  server, arguments, photos, tmp_path
):
  damaged = tmp_path / 'damaged'
  shutil.copytree(photos, damaged)
  picture = min((damaged / 'val' / 'cat').iterdir())
  good = picture.read_bytes()
  arguments += [f'--config.data.path={damaged}', '--config.train.steps=600']
  with _start([*arguments, '--config.evaluation.every=300']) as training:
    lines = _wait_for_updates(training.stderr)
    _damage(picture)
    lines += training.stderr.read().splitlines()
  said = _assert_one_error(lines, '')
  assert f'val/cat/{picture.name} is no image' in said
  assert checkpointing.latest_step(str(tmp_path / 'run')) == 300
  picture.write_bytes(good)
  result = server.run(
    'train', *arguments, '--config.train.steps=301',
    '--config.evaluation.every=300',
  )  # fmt: skip
  assert result.code == 0, result.err
  records = logs.read(tmp_path / 'run')
  measured = [r['step'] for r in records if 'val/velocity_loss' in r]
  assert measured == [300, 301]
  assert [r['step'] for r in records if 'loss' in r] == list(range(1, 302))
