"""Runs commands that depend on each other, several side by side.

No command outlives the process that started it, even one that is killed, and
no two processes run the commands of one folder at the same time.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from selfboottok_jax import errors

# A process that was killed holds the lock until its commands are gone too.
_PATIENCE = 20.0
_POLL = 0.1
# Runs a module as `python -m` does, in a process that the kernel kills with its
# parent; where it does not, a thread looks for the parent twice a second.
_GUARD = """
import ctypes, os, runpy, signal, sys, threading, time
parent, module = int(sys.argv[1]), sys.argv[2]
def watch():
  while os.getppid() == parent:
    time.sleep(0.5)
  os.kill(os.getpid(), signal.SIGKILL)
if sys.platform == 'linux':
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)
else:
  threading.Thread(target=watch, daemon=True).start()
if os.getppid() != parent:
  os.kill(os.getpid(), signal.SIGKILL)
sys.argv = [module, *sys.argv[3:]]
runpy.run_module(module, run_name='__main__', alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Job:
  """A module of Python to run.

  Attributes:
    name: unique among the jobs, and the name of its log.
    module: as for `python -m`.
    arguments: of its command line.
    needs: names of jobs that must have succeeded before.
    is_done: True if it needs not run, asked before it starts.
  """

  name: str
  module: str
  arguments: Sequence[str]
  needs: Sequence[str]
  is_done: Callable[[], bool]

  def __str__(self) -> str:
    """The command as a user would type it."""
    return f'python -m {self.module} {shlex.join(self.arguments)}'


def run(
  jobs: Sequence[Job],
  logs: pathlib.Path,
  places: Sequence[Mapping[str, str]],
  *,
  say: Callable[[str], None],
  on_end: Callable[[Job, str], None],
  kept: int | None = None,
) -> dict[str, str]:
  """Runs jobs, as many at a time as there are places.

  A job that fails takes those that need it with it, and no others. If this is
  interrupted, running jobs get SIGTERM and are waited for.

  Args:
    jobs: each after those that it needs.
    logs: folder for the output of each, as NAME.log.
    places: variables of the environment for each job that runs at a time, as
      `share_devices` makes them.
    say: called with a line when a job starts and ends.
    on_end: called with a job that ran and '', or with the reason for which it
      failed or could not start.
    kept: an open file, see `locked`, that jobs keep open too.

  Returns:
    Reasons by name of the jobs that failed or could not start.
  """
  logs.mkdir(parents=True, exist_ok=True)
  failed: dict[str, str] = {}
  done: set[str] = set()
  waiting = collections.deque(jobs)
  running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}

  def end(job: Job, reason: str) -> None:
    if reason:
      failed[job.name] = reason
    else:
      done.add(job.name)
    on_end(job, reason)

  with _interruptible():
    try:
      while waiting or running:
        for place, (job, process, began) in list(running.items()):
          if process.poll() is None:
            continue
          del running[place]
          reason = _reason(process.returncode, logs / f'{job.name}.log')
          seconds = time.monotonic() - began
          say(f'{job.name}: {reason or f"done after {seconds:.0f} s"}')
          end(job, reason)
        free = [i for i in range(len(places)) if i not in running]
        started = False
        for job in list(waiting):
          lost = [name for name in job.needs if name in failed]
          if lost:
            waiting.remove(job)
            end(job, f'needs {lost[0]}, which failed')
          elif not done.issuperset(job.needs):
            continue
          elif job.is_done():
            waiting.remove(job)
            done.add(job.name)
          elif free:
            waiting.remove(job)
            place = free.pop(0)
            say(f'{job.name}: started')
            process = _start(job, logs, places[place], kept)
            running[place] = (job, process, time.monotonic())
          else:
            continue
          started = True
        if not started:
          time.sleep(_POLL)
    finally:
      _stop([process for _, process, _ in running.values()])
  return failed


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[int]:
  """Holds a folder for this process and those that inherit the lock.

  Yields:
    The open file that holds it.

  Raises:
    ConfigError: another process has it, and keeps it for some seconds.
  """
  folder.mkdir(parents=True, exist_ok=True)
  deadline = time.monotonic() + _PATIENCE
  with (folder / '.lock').open('w') as file:
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except OSError as error:
        if time.monotonic() > deadline:
          raise errors.ConfigError(
            f'{folder} is in use by another command; wait for its end, or '
            'choose another --workdir'
          ) from error
        time.sleep(_POLL)
    yield file.fileno()


def share_devices(count: int) -> list[dict[str, str]]:
  """Variables that share this machine's accelerators among commands.

  Accelerators are counted without claiming them. What the user has hidden by
  CUDA_VISIBLE_DEVICES or TPU_VISIBLE_CHIPS stays hidden.

  Args:
    count: commands at a time; 0 is one for each accelerator, and one if there
      are none.

  Raises:
    ConfigError: there are accelerators, but fewer than `count`.
  """
  name, devices = _accelerators()
  if not devices or count == 1:
    return [{} for _ in range(count or 1)]
  count = count or len(devices)
  if count > len(devices):
    raise errors.ConfigError(
      f'--jobs={count} on {len(devices)} accelerators; wanted at most one for '
      'each, or JAX_PLATFORMS=cpu'
    )
  # Dealt out in runs of neighbours.
  bounds = [i * len(devices) // count for i in range(count + 1)]
  shares = [
    devices[first:last] for first, last in zip(bounds, bounds[1:], strict=False)
  ]
  places = [{name: ','.join(share)} for share in shares]
  if name == 'TPU_VISIBLE_CHIPS':
    for place, share in zip(places, shares, strict=True):
      place['TPU_CHIPS_PER_PROCESS_BOUNDS'] = f'1,{len(share)},1'
      place['TPU_PROCESS_BOUNDS'] = '1,1,1'
  return places


def _accelerators() -> tuple[str, list[str]]:
  """The variable that chooses accelerators, and those that there are."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms.split(',')[0] == 'cpu':
    return '', []
  for name in ('CUDA_VISIBLE_DEVICES', 'TPU_VISIBLE_CHIPS'):
    if name in os.environ:
      return name, [d for d in os.environ[name].split(',') if d]
  if shutil.which('nvidia-smi'):
    listed = subprocess.run(
      ['nvidia-smi', '-L'], capture_output=True, text=True, check=False
    ).stdout
    count = sum(line.startswith('GPU ') for line in listed.splitlines())
    return 'CUDA_VISIBLE_DEVICES', [str(i) for i in range(count)]
  chips = list(pathlib.Path('/dev').glob('accel[0-9]*'))
  return 'TPU_VISIBLE_CHIPS', [str(i) for i in range(len(chips))]


def _start(
  job: Job, logs: pathlib.Path, place: Mapping[str, str], kept: int | None
) -> subprocess.Popen[bytes]:
  arguments = [sys.executable, '-c', _GUARD, str(os.getpid()), job.module]
  with (logs / f'{job.name}.log').open('wb') as log:
    return subprocess.Popen(
      [*arguments, *job.arguments],
      env=os.environ | place,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      # A signal of the terminal comes by way of this process, once.
      start_new_session=True,
      pass_fds=() if kept is None else (kept,),
    )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
  """Asks processes to end, and waits; a second signal kills them."""
  try:
    for process in processes:
      process.terminate()
    for process in processes:
      process.wait()
  finally:
    for process in processes:
      process.kill()


def _reason(code: int, log: pathlib.Path) -> str:
  """Why a command failed, in one line; '' if it did not."""
  if code == 0:
    return ''
  lines = log.read_text(errors='replace').splitlines()
  said = [line for line in lines if line.startswith('error: ')]
  if said:
    return said[-1].removeprefix('error: ')
  what = f'signal {signal.Signals(-code).name}' if code < 0 else f'code {code}'
  last = next((line for line in reversed(lines) if line.strip()), '')
  return f'ended by {what}: {last}' if last else f'ended by {what}'


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Makes SIGTERM and SIGHUP an interrupt, as SIGINT is one."""

  def interrupt(number: int, frame: Any) -> None:
    del number, frame
    raise KeyboardInterrupt

  before = {
    number: signal.signal(number, interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
