"""Synchronisation of the processes of one run, each of which may fail alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from selfboottok_jax import errors


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
  """Makes the processes leave a block together, or all fail.

  Put checks and file access of a single process inside: without it the others
  would wait forever for one that failed, or would find files that a faster one
  has written after the block. The block must not contain collectives.

  Raises:
    UserError: the error of this process, or a note that another one failed.
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


def check_same(what: str, value: str) -> None:
  """Raises ConfigError on all processes unless all have the same `value`.

  Each process reads flags and checkpoints itself, and a run that is being
  trained may get a new checkpoint in between.
  """
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
  every = multihost_utils.process_allgather(digest)
  if (every != every[0]).any():
    raise errors.ConfigError(
      f'the processes have different {what}; give all of them the same flags, '
      'and runs that are not being trained'
    )


def meet(name: str) -> None:
  """Waits until all processes have called this; `name` must be the same."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
