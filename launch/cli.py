"""Entry points: flags, and errors as one line with a non-zero exit."""

import difflib
import itertools
import logging as python_logging
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from selfboottok_jax import errors, trees
from selfboottok_jax.training import loop, processes

# What loading a config file can raise, its own mistakes included.
_CONFIG_ERRORS = (
  AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError,
  ValueError,
)  # fmt: skip
# By what absl says of a value that is none.
_KINDS = {
  'invalid literal for int()': 'an integer',
  'could not convert string to float': 'a number',
  'Non-boolean argument': 'true or false',
}
# What names the processes of a run where no scheduler does.
_JOINING = {
  'JAX_COORDINATOR_ADDRESS': r'.+:\d+',
  'JAX_NUM_PROCESSES': r'[1-9]\d*',
  'JAX_PROCESS_ID': r'\d+',
}
# Of a process that ended on SIGINT, by the convention of shells.
_INTERRUPTED = 130


def run(
  main: Callable[[Sequence[str]], None], *, continues: bool = True
) -> None:
  """Runs an absl main; a user's mistake ends it with one clear line.

  `continues`: whether the command goes on where it was stopped.
  """
  logging.set_verbosity(logging.ERROR)
  python_logging.getLogger('jax').setLevel(python_logging.ERROR)
  app.run(lambda argv: _guarded(main, argv, continues), flags_parser=_parse)


def _guarded(main, argv, continues):
  try:
    if len(argv) > 1:
      raise errors.ConfigError(
        f'unexpected argument {argv[1]!r}; flags are written --name=value'
      )
    main(argv)
  except (errors.UserError, loop.DivergedError) as error:
    _end(str(error), 1)
  except (loop.Interrupted, KeyboardInterrupt) as error:
    if not continues:
      _end('stopped', _INTERRUPTED)
    _end(f'{str(error) or "stopped"}; the same command continues', _INTERRUPTED)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _end(_plain(str(error)), 2)


def _plain(message: str) -> str:
  """What absl says of a flag, in words that need no Python."""
  for reason, kind in _KINDS.items():
    if reason in message:
      given = message.removeprefix('flag ').partition(': ')[0]
      return f'{given}; wanted {kind}'
  return f'{message}; --help lists the flags'


def _end(message: str, code: int) -> None:
  line = ' '.join(message.split())
  sys.stderr.write(f'error: {line}\n')
  sys.stderr.flush()
  sys.exit(code)


def define_config(default: str | None = None) -> flags.FlagHolder:
  """The --config=FILE:PRESET flag; an unknown key ends the process here.

  The flag of ml_collections says neither which key, file or preset is wrong
  nor what there is, and with a default it reads the command line right away.
  """
  try:
    _check_config(sys.argv[1:], default)
  except errors.ConfigError as error:
    _end(str(error), 2)
  return config_flags.DEFINE_config_file(
    'config', default, 'Configuration as FILE.py:PRESET.', lock_config=True
  )


def _check_config(arguments: Sequence[str], default: str | None) -> None:
  """Raises ConfigError for a file, preset or key that is not there."""
  path, keys = default, []
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


def require(**values: str | None) -> None:
  """Raises ConfigError for flags that were left out."""
  missing = [f'--{name}' for name, value in values.items() if not value]
  if missing:
    raise errors.ConfigError(
      f'{", ".join(missing)} not given; wanted a value, as in '
      f'{missing[0]}=VALUE'
    )


def start_jax(*, multihost: bool = False, devices: int | None = None) -> None:
  """Joins the other hosts, and keeps compiled programs for the next start.

  `devices` makes up so many on the CPU in place of the real ones.
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
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  cache = folder or os.path.join(
    os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')),
    'selfboottok_jax',
  )
  jax.config.update('jax_compilation_cache_dir', cache)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)
  # Early: the first meeting does not wait long for those who come late. Not
  # before the cache is set: what is compiled first decides whether it is used.
  processes.meet('joined')


def _join() -> None:
  """Joins the processes that a scheduler, a pod or the environment names."""
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
