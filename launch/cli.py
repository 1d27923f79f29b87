"""Entry points: flags, and errors as one line with a non-zero exit.

A command declares its flags in a `Flags` of its own and is started by `run`:

  FLAGS = cli.Flags()
  _WORKDIR = FLAGS.string('workdir', '', 'Folder of the run.')

  def main() -> None:
    cli.require(workdir=_WORKDIR.value)
    ...

  if __name__ == '__main__':
    cli.run(main, FLAGS)

Declaring defines nothing yet: absl's flags are global, and two commands that
are imported by one process may have flags of the same name.
"""

import contextlib
import difflib
import itertools
import logging as python_logging
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from selfboottok_jax import errors, files, trees
from selfboottok_jax.training import loop, processes

Holder = flags.FlagHolder
Texts = list[str]
# Errors of loading a config file, mistakes in the file included.
_CONFIG_ERRORS = (
  AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError,
  ValueError,
)  # fmt: skip
# The kind of value that was wanted, by absl's words for a wrong one.
_KINDS = {
  'invalid literal for int()': 'an integer',
  'could not convert string to float': 'a number',
  'Non-boolean argument': 'true or false',
}
# Variables that describe the processes of a run without a scheduler.
_JOINING = {
  'JAX_COORDINATOR_ADDRESS': r'.+:\d+',
  'JAX_NUM_PROCESSES': r'[1-9]\d*',
  'JAX_PROCESS_ID': r'\d+',
}
# Exit code of a process that SIGINT ended, by the convention of shells.
_INTERRUPTED = 130


class Flags:
  """The flags of one command; they become absl's when `run` starts it."""

  def __init__(self) -> None:
    """Starts without flags."""
    self._own = flags.FlagValues()
    self._config: ConfigFlag | None = None

  def string(self, name: str, default: str, help: str) -> Holder[str]:
    """Declares a text; '' if it must be given or may be left out."""
    return flags.DEFINE_string(name, default, help, flag_values=self._own)

  def strings(self, name: str, default: list[str], help: str) -> Holder[Texts]:
    """Declares a comma-separated list; `default` if it was not given."""
    return flags.DEFINE_list(name, default, help, flag_values=self._own)

  def choice(
    self, name: str, default: str, known: Iterable[str], help: str
  ) -> Holder[str]:
    """Declares one of the `known` texts."""
    return flags.DEFINE_enum(
      name, default, list(known), help, flag_values=self._own
    )

  def switch(self, name: str, default: bool, help: str) -> Holder[bool]:
    """Declares --NAME and --noNAME."""
    return flags.DEFINE_bool(name, default, help, flag_values=self._own)

  def integer(self, name: str, default: int, help: str) -> Holder[int]:
    """Declares an integer."""
    return flags.DEFINE_integer(name, default, help, flag_values=self._own)

  def optional_integer(self, name: str, help: str) -> Holder[int | None]:
    """Declares an integer that is None if it was not given."""
    return flags.DEFINE_integer(name, None, help, flag_values=self._own)

  def number(self, name: str, default: float, help: str) -> Holder[float]:
    """Declares a number."""
    return flags.DEFINE_float(name, default, help, flag_values=self._own)

  def optional_number(self, name: str, help: str) -> Holder[float | None]:
    """Declares a number that is None if it was not given."""
    return flags.DEFINE_float(name, None, help, flag_values=self._own)

  def config(self, default: str = '') -> 'ConfigFlag':
    """Declares --config=FILE:PRESET and --config.KEY=VALUE."""
    self._config = ConfigFlag(default)
    return self._config

  def parse(self, argv: Sequence[str]) -> list[str]:
    """Sets the flags from a command line; returns what is no flag.

    Raises:
      ConfigError: a configuration file, preset or key that does not exist.
      flags.Error: an unknown flag, or a value of the wrong type.
    """
    argv = [_with_home(argument) for argument in argv]
    every = flags.FLAGS
    for name in self._own:
      every[name] = self._own[name]
      # --help lists the flags of the module that was started.
      every.register_key_flag_for_module(sys.argv[0], self._own[name])
    try:
      if self._config:
        self._config.define()
      # All of them together: grain reads the global ones, too.
      left = every(argv)
    except (flags.Error, *_CONFIG_ERRORS):
      if self._config:
        # Says more than absl and ml_collections do.
        check_config(argv[1:], self._config.default)
      raise
    # A file that does not exist is no error to ml_collections until it is read.
    if self._config and not self._config.is_loaded:
      check_config(argv[1:], self._config.default)
    self._own.mark_as_parsed()
    return left


class ConfigFlag:
  """The flags --config=FILE:PRESET and --config.KEY=VALUE of a command."""

  def __init__(self, default: str):
    """Declares the flags; `default` is the file if none is given."""
    self.default = default

  def define(self) -> None:
    """Defines the flags; a default is loaded at once, --config when parsed."""
    config_flags.DEFINE_config_file(
      'config',
      self.default or None,
      'Configuration as FILE.py:PRESET.',
      lock_config=True,
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], self._flag)

  @property
  def _flag(self) -> flags.Flag:
    return flags.FLAGS['config']

  @property
  def is_loaded(self) -> bool:
    """True if there is a configuration."""
    return isinstance(self._flag.value, ml_collections.ConfigDict)

  @property
  def value(self) -> ml_collections.ConfigDict:
    """The configuration, locked.

    Raises:
      ConfigError: none was given.
    """
    if self._flag.value is None:
      require(config='')
    return self._flag.value

  @property
  def overrides(self) -> dict[str, Any]:
    """The keys that were given as --config.KEY=VALUE, and their values."""
    return dict(config_flags.get_override_values(self._flag))

  @property
  def name(self) -> str:
    """FILE:PRESET and the keys that were overridden, as text."""
    changed = [f'config.{k}={v}' for k, v in self.overrides.items()]
    return ' '.join([config_flags.get_config_filename(self._flag), *changed])


def run(
  main: Callable[[], None], own: Flags, *, continues: bool = True
) -> None:
  """Parses the flags of a command and runs it.

  A user's mistake ends the process with one clear line.

  Args:
    main: the command.
    own: its flags.
    continues: True if the command, given again, goes on where it was stopped.
  """
  logging.set_verbosity(logging.ERROR)
  python_logging.getLogger('jax').setLevel(python_logging.ERROR)
  app.run(
    lambda argv: _guarded(main, argv, continues),
    flags_parser=lambda argv: _parse(own, argv),
  )


def _guarded(
  main: Callable[[], None], argv: Sequence[str], continues: bool
) -> None:
  try:
    if len(argv) > 1:
      raise errors.ConfigError(
        f'unexpected argument {argv[1]!r}; flags are written --name=value'
      )
    main()
  except (errors.UserError, loop.DivergedError) as error:
    _end(str(error), 1)
  except (loop.Interrupted, KeyboardInterrupt) as error:
    if not continues:
      _end('stopped', _INTERRUPTED)
    _end(f'{str(error) or "stopped"}; the same command continues', _INTERRUPTED)


def _parse(own: Flags, argv: Sequence[str]) -> list[str]:
  try:
    return own.parse(argv)
  except errors.ConfigError as error:
    _end(str(error), 2)
  except flags.Error as error:
    _end(_plain(str(error)), 2)


def _with_home(argument: str) -> str:
  """Expands the ~ of --config=~/FILE, which shells leave as it is."""
  match = re.fullmatch(r'(--?config=)(~.*)', argument)
  return match[1] + os.path.expanduser(match[2]) if match else argument


def _plain(message: str) -> str:
  """Rewrites absl's message about a flag in words that need no Python."""
  for reason, kind in _KINDS.items():
    if reason in message:
      given = message.removeprefix('flag ').partition(': ')[0]
      return f'{given}; wanted {kind}'
  return f'{message}; --help lists the flags'


def _end(message: str, code: int) -> NoReturn:
  line = ' '.join(message.split())
  # A terminal that was closed takes nothing any more.
  with contextlib.suppress(OSError):
    sys.stderr.write(f'error: {line}\n')
    sys.stderr.flush()
  sys.exit(code)


def check_config(arguments: Sequence[str], default: str = '') -> None:
  """Looks for the mistake in the --config flags of a command line.

  Called when parsing has failed: absl and ml_collections say neither which key,
  file or preset is wrong nor which there are.

  Raises:
    ConfigError: a file, preset or key does not exist.
  """
  path: str | None = default
  keys = []
  for argument, following in itertools.zip_longest(arguments, arguments[1:]):
    if match := re.fullmatch(r'--?config(?:=(.*))?', argument):
      path = following if match[1] is None else match[1]
    elif match := re.match(r'--?(?:no)?config\.([\w.]+)', argument):
      keys.append(match[1])
  if not path:
    return
  known = trees.flatten(_load_config(path).to_dict())
  for key in keys:
    if key in known or any(name.startswith(f'{key}.') for name in known):
      continue
    close = difflib.get_close_matches(key, known, n=4, cutoff=0.5)
    close = close or sorted({name.split('.')[0] for name in known})
    raise errors.ConfigError(
      f'--config.{key} is no key of {path}; wanted one of '
      f'{", ".join(f"--config.{name}" for name in close)}'
    )


def _load_config(path: str) -> ml_collections.ConfigDict:
  file, _, preset = path.partition(':')
  if not os.path.isfile(file):
    raise errors.ConfigError(
      f'--config={path}: no file {file}; wanted FILE.py or FILE.py:PRESET, as '
      'configs/tokenizer.py:quickstart'
    )
  try:
    get_config = runpy.run_path(file).get('get_config')
    if get_config is None:
      raise ValueError('it has no function get_config')
    return get_config(preset) if preset else get_config()
  except _CONFIG_ERRORS as error:
    raise errors.ConfigError(
      f'--config={path} cannot be used: {error}'
    ) from error


def require(**values: str | Texts) -> None:
  """Raises ConfigError for flags that are empty: those that were left out."""
  missing = [f'--{name}' for name, value in values.items() if not value]
  if missing:
    raise errors.ConfigError(
      f'{", ".join(missing)} not given; wanted a value, as in '
      f'{missing[0]}=VALUE'
    )


def check_least(flag: Holder[int], least: int) -> None:
  """Raises ConfigError if the value of a flag is below `least`."""
  if flag.value < least:
    raise errors.ConfigError(
      f'--{flag.name}={flag.value}; wanted {least} or more'
    )


def start_jax(*, multihost: bool = False, devices: int | None = None) -> None:
  """Joins the other hosts, and turns on the cache of compiled programs.

  Args:
    multihost: whether to join the other processes of a pod or a cluster.
    devices: number of simulated CPU devices in place of the real ones.
  """
  if devices is not None:
    if devices < 1 or multihost:
      raise errors.ConfigError(
        f'--devices={devices}{" with --multihost" * multihost}; wanted 1 or '
        'more, in one process'
      )
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)
  if multihost:
    _join()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  cache = files.as_path(folder or os.path.join(base, 'selfboottok_jax'))
  jax.config.update('jax_compilation_cache_dir', os.fspath(cache))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  # Early, as the first collective waits only shortly for late processes; but
  # after the cache is set: the first program decides whether it is used.
  processes.meet('joined')


def _join() -> None:
  """Joins the processes that a scheduler or the environment describes."""
  given = {name: os.environ.get(name, '') for name in _JOINING}
  wrong = [
    f'{name}={given[name]!r}'
    for name, form in _JOINING.items()
    if not re.fullmatch(form, given[name])
  ]
  named = any(given.values())
  if named and wrong:
    raise errors.ConfigError(
      f'--multihost cannot join: {", ".join(wrong)}; wanted '
      'JAX_COORDINATOR_ADDRESS=HOST:PORT and the integers JAX_NUM_PROCESSES '
      'and JAX_PROCESS_ID'
    )
  try:
    if named:
      address, count, index = given.values()
      jax.distributed.initialize(address, int(count), int(index))
    else:
      jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    raise errors.ConfigError(
      f'--multihost found no other processes to join: {error}; start it on a '
      f'TPU pod, under Slurm or MPI, or set {", ".join(_JOINING)}'
    ) from error


def say(text: str) -> None:
  """Prints a result."""
  sys.stdout.write(text + '\n')
  sys.stdout.flush()
