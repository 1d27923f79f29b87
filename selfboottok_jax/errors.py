"""Errors that a user can cause and mend; mains print them as one line."""

from collections.abc import Iterable


class UserError(Exception):
  """Bad input: says what was given, what was wanted and what to do."""


class ConfigError(UserError):
  """A config, flag or preset that cannot be used."""


class DataError(UserError):
  """Images that are missing, unreadable or of the wrong kind."""


class WeightsError(UserError):
  """A weight file that is missing, damaged or of another network."""


class CheckpointError(UserError):
  """A workdir or checkpoint that does not fit what was asked."""


def require(ok: bool, name: str, value: object, wanted: str) -> None:
  """Raises ConfigError unless `ok`: what was given, and what was wanted.

  Args:
    ok: the condition; write it so that NaN fails, as `x > 0`.
    name: the key of the configuration.
    value: what it was set to.
    wanted: completes "wanted ...".
  """
  if not ok:
    raise ConfigError(f'{name}={value!r}; wanted {wanted}')


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
  """Raises ConfigError unless `value` is one of `choices`."""
  choices = tuple(choices)
  require(value in choices, name, value, f'one of {", ".join(choices)}')
