"""Agreement among the processes of one run, each of which may fail alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from selfboottok_jax import errors


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
  """A block that all processes end before any goes on, or that ends them all.

  For what each does by itself: what goes wrong in one would leave the others
  waiting for it, and what one writes next would be there for the others to
  find. Processes must not meet inside.

  Raises:
    UserError: that of this process, or that another has one.
  """
  error = None
  try:
    yield
  except errors.UserError as caught:
    error = caught
  failed = np.asarray([error is not None])
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(failed).ravel()
  if error is not None:
    raise error
  if failed.any():
    raise errors.UserError(
      f'process {np.flatnonzero(failed)[0]} of {len(failed)} cannot go on; '
      'mend what its own message says'
    )


def check_same(what: str, told: str) -> None:
  """Raises ConfigError on all processes unless all were told the same.

  Each reads flags and checkpoints itself, and a run that is being trained may
  get a checkpoint in between.
  """
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(told.encode()).digest(), np.uint8)
  every = multihost_utils.process_allgather(digest)
  if (every != every[0]).any():
    raise errors.ConfigError(
      f'the processes have different {what}; give all of them the same flags, '
      'and runs that are not being trained'
    )


def meet(where: str) -> None:
  """Waits until all processes have come to the same place."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)
