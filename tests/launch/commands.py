"""Runs commands as users do, in processes that share the slow imports.

A fork server imports JAX and the package once; every command is then a forked
process of its own, with its own flags, devices, exit code and output.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import jax

from tests.launch import tiny

ROOT = pathlib.Path(__file__).parents[2]
# Modules that the mains import; the mains themselves run in each process.
_PRELOAD = [
  'configs.evaluate',
  'selfboottok_jax.stages.train',
  'selfboottok_jax.evaluation.evaluate',
  'selfboottok_jax.evaluation.report',
  'tests.launch.tiny',
]
# Generous: on a loaded machine compiling alone takes minutes.
_TIMEOUT = 900


def environment() -> dict[str, str]:
  """Environment of a command: this process's, on one CPU device."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def spawn(module: str, *arguments: str, **variables: str) -> subprocess.Popen:
  """`python -m launch.MODULE ARGUMENTS` as a shell starts it, output piped.

  A module with a dot in its name is not one of `launch`.
  """
  module = module if '.' in module else f'launch.{module}'
  return subprocess.Popen(
    [sys.executable, '-m', module, *arguments],
    cwd=ROOT,
    env=environment() | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run_together(module: str, *arguments: str) -> list['Result']:
  """The same command in two processes, as on two hosts; both must succeed."""
  results = run_joined(module, [*arguments], [*arguments])
  for result in results:
    assert result.code == 0, results
  return results


def run_joined(module: str, *arguments: list[str]) -> list['Result']:
  """A process for each list of arguments, joined as hosts are."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  processes = [
    spawn(
      module,
      '--multihost',
      *own,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES=str(len(arguments)),
      JAX_PROCESS_ID=str(index),
    )
    for index, own in enumerate(arguments)
  ]
  try:
    ended = [process.communicate(timeout=600) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [
    Result(process.returncode, out, err)
    for process, (out, err) in zip(processes, ended, strict=True)
  ]


def _is_log(line: str) -> bool:
  """True for what a training writes: its data, then its steps."""
  return ': step ' in line or line.startswith(
    ('data: ', 'split: ', 'skipped: ')
  )


@dataclasses.dataclass(frozen=True)
class Result:
  """Exit code and output of a command."""

  code: int
  out: str
  err: str

  @property
  def error(self) -> str:
    """The error that ended it; fails unless that is one line, the last one."""
    assert self.code in (1, 2), (self.code, self.out, self.err)
    assert 'Traceback' not in self.err, self.err
    *before, last = self.err.splitlines()
    assert last.startswith('error: '), self.err
    # Only the log of a training may come before.
    assert all(_is_log(line) for line in before), self.err
    return last


class Server:
  """Starts commands; several at a time where they are given together."""

  def __init__(self, folder: pathlib.Path):
    """Keeps the outputs of the commands in `folder`."""
    self._folder, self._count = folder, 0
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(_PRELOAD)

  def run(self, module: str, *arguments: str, **variables: str) -> Result:
    """`python -m launch.MODULE ARGUMENTS`, with tiny quickstart presets.

    A module with a dot in its name is not one of `launch`.
    """
    return self.finish(self.start(module, *arguments, **variables))

  def start(self, module: str, *arguments: str, **variables: str):
    """Starts a command without waiting for it; `finish` waits."""
    self._count += 1
    output = self._folder / str(self._count)
    module = module if '.' in module else f'launch.{module}'
    process = self._context.Process(
      target=_child,
      args=(module, arguments, variables, str(output)),
    )
    process.start()
    return process, output

  def finish(self, started) -> Result:
    """The result of a command that `start` started."""
    process, output = started
    process.join(_TIMEOUT)
    if process.is_alive():
      process.kill()
    out, err = (output.with_suffix(s).read_text() for s in ('.out', '.err'))
    return Result(process.exitcode, out, err)


def _child(module, arguments, variables, output) -> None:
  os.environ.update(environment() | variables)
  for stream, suffix in ((sys.stdout, '.out'), (sys.stderr, '.err')):
    with open(output + suffix, 'w') as file:
      os.dup2(file.fileno(), stream.fileno())
  os.chdir(ROOT)
  # The server read its environment when it imported JAX.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  tiny.shrink()
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name='__main__', alter_sys=True)
