"""Synchronisation of the processes of a run, each of which may fail alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from selfboottok_jax import errors


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
  """Makes all processes leave a block together, or all fail.

  Put checks and file access of a single process inside. Without it the others
  would wait for ever for a process that failed, or would find files that a
  faster one has written after the block. The block must not contain
  collectives, which a failed process would not reach.

  Raises:
    UserError: the error of this process, or a note that another one failed.
  """
  error = None
  try:
    yield
  # Any other error is a bug: its traceback should end the process at once.
  except errors.UserError as caught:
    error = caught
  # This exchange is also the barrier that no process passes early.
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


def check_same(what: str, value: str) -> None:
  """Checks that all processes have the same `value`.

  Each process reads flags and checkpoints itself, and a run that is still being
  trained may write a checkpoint in between.

  Args:
    what: description of the value, for the error.
    value: the value, of any length.

  Raises:
    ConfigError: on all processes, if any of the values differs.
  """
  if jax.process_count() == 1:
    return
  # A gather needs arrays of one shape, which texts do not have.
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
  every = multihost_utils.process_allgather(digest)
  if (every != every[0]).any():
    raise errors.ConfigError(
      f'the processes have different {what}; give all of them the same flags, '
      'and runs that are not being trained'
    )


def meet(name: str) -> None:
  """Waits until all processes have called this, with the same `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
