"""Runs commands as users do, in processes that share the slow imports.

A fork server imports JAX and the package once; every command is then a forked
process of its own, with its own flags, devices, exit code and output.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import sys

from tests.launch import tiny

ROOT = pathlib.Path(__file__).parents[2]
CACHE = ROOT / '.cache' / 'jax'
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'JAX_COMPILATION_CACHE_DIR': str(CACHE),
}
# What the mains import, but no main: each defines flags of the same names.
_PRELOAD = [
  'configs.evaluate',
  'launch.build',
  'launch.trainer',
  'selfboottok_jax.evaluation.evaluate',
  'selfboottok_jax.evaluation.report',
  'tests.launch.tiny',
]
_TIMEOUT = 120


@dataclasses.dataclass(frozen=True)
class Result:
  """How a command ended."""

  code: int
  out: str
  err: str

  @property
  def error(self) -> str:
    """The one line of an error; fails where there is more, or none."""
    assert 'Traceback' not in self.err, self.err
    lines = [x for x in self.err.splitlines() if x.startswith('error: ')]
    assert len(lines) == 1, self.err
    assert self.err.splitlines()[-1] == lines[0], self.err
    assert self.code != 0
    return lines[0]


class Server:
  """Starts commands; several at a time where they are given together."""

  def __init__(self, folder: pathlib.Path):
    """Keeps the outputs of the commands in `folder`."""
    self._folder, self._count = folder, 0
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(_PRELOAD)

  def run(self, module: str, *arguments: str, **environment: str) -> Result:
    """`python -m launch.MODULE ARGUMENTS`, with tiny quickstart presets."""
    return self.finish(self.start(module, *arguments, **environment))

  def start(self, module: str, *arguments: str, **environment: str):
    """As `run`, without waiting; `finish` waits."""
    self._count += 1
    output = self._folder / str(self._count)
    process = self._context.Process(
      target=_child,
      args=(f'launch.{module}', arguments, environment, str(output)),
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


def _child(module, arguments, environment, output) -> None:
  os.environ.update(ENVIRONMENT | environment)
  for stream, suffix in ((sys.stdout, '.out'), (sys.stderr, '.err')):
    with open(output + suffix, 'w') as file:
      os.dup2(file.fileno(), stream.fileno())
  os.chdir(ROOT)
  tiny.shrink()
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name='__main__', alter_sys=True)
