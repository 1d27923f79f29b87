"""Entry points: flags, and errors as one line with a non-zero exit."""

import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from selfboottok_jax import errors
from selfboottok_jax.training import loop

# What ml_collections raises for keys, types and presets that it cannot take.
_CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError, OSError)
# Of a process that ended on SIGINT, by the convention of shells.
_INTERRUPTED = 130


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs an absl main; a user's mistake ends it with one clear line."""
  logging.set_verbosity(logging.ERROR)
  python_logging.getLogger('jax').setLevel(python_logging.ERROR)
  app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _guarded(main, argv):
  try:
    if len(argv) > 1:
      raise errors.ConfigError(
        f'unexpected argument {argv[1]!r}; flags are written --name=value'
      )
    main(argv)
  except (errors.UserError, loop.DivergedError) as error:
    _end(str(error), 1)
  except (loop.Interrupted, KeyboardInterrupt) as error:
    _end(f'{str(error) or "stopped"}; the same command continues', _INTERRUPTED)


def _parse(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _end(f'{error}; --help lists the flags', 2)
  except errors.UserError as error:
    _end(str(error), 2)
  except _CONFIG_ERRORS as error:
    _end(f'--config: {_plain(error)}', 2)


def _plain(error: Exception) -> str:
  """The message of an exception without the quotes that KeyError adds."""
  return str(error.args[0]) if error.args else type(error).__name__


def _end(message: str, code: int) -> None:
  line = ' '.join(message.split())
  sys.stderr.write(f'error: {line}\n')
  sys.stderr.flush()
  sys.exit(code)


def define_config() -> flags.FlagHolder:
  """The --config=FILE:PRESET flag, locked: unknown keys are errors."""
  return config_flags.DEFINE_config_file(
    'config', None, 'Configuration as FILE.py:PRESET.', lock_config=True
  )


def require(**values: str | None) -> None:
  """Raises ConfigError for flags that were left out."""
  missing = [f'--{name}' for name, value in values.items() if not value]
  if missing:
    raise errors.ConfigError(
      f'{", ".join(missing)} not given; wanted a value, as in '
      f'{missing[0]}=VALUE'
    )


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
  """Raises ConfigError for a folder that can be neither made nor written."""
  folder = pathlib.Path(path).absolute()
  nearest = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
  if not nearest.is_dir():
    reason = f'{nearest} is no folder'
  elif not os.access(nearest, os.W_OK | os.X_OK):
    reason = f'{nearest} is not writable'
  else:
    return
  raise errors.ConfigError(
    f'--{name}={path} cannot be written: {reason}; choose another folder'
  )


def start_jax(*, multihost: bool = False) -> None:
  """Joins the other hosts, and keeps compiled programs for the next start."""
  if multihost:
    jax.distributed.initialize()
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  cache = folder or os.path.join(
    os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')),
    'selfboottok_jax',
  )
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


def say(text: str) -> None:
  """Prints a result."""
  sys.stdout.write(text + '\n')
  sys.stdout.flush()
