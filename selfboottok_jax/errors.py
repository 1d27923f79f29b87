"""Errors that a user can cause and mend; mains print them as one line."""


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
