"""Synchronisation of the processes of a run, each of which may fail alone."""

import contextlib
import hashlib
import pathlib
import platform
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

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


def anywhere(flag: bool) -> bool:
  """True on all processes if `flag` is on any; all must call this together."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


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
  every = _gather(value)
  if (every != every[0]).any():
    raise errors.ConfigError(
      f'the processes have different {what}; give all of them the same flags, '
      'and runs that are not being trained'
    )


def meet(name: str) -> None:
  """Waits until all processes have called this, with the same `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def count_alike(value: str) -> int:
  """Counts the processes of this machine with the same `value`, itself too.

  A container is a machine of its own. All processes must call this.
  """
  if jax.process_count() == 1:
    return 1
  # Names are not always unique, as 'localhost'.
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  machine = platform.node() + (boot.read_text() if boot.exists() else '')
  every = _gather(f'{machine} {value}')
  mine = every[jax.process_index()]
  return int((every == mine).all(axis=1).sum())


def _gather(value: str) -> UInt8[np.ndarray, 'p 32']:
  """A digest of each process's value, by process."""
  # A gather needs arrays of one shape, which texts do not have.
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
  return multihost_utils.process_allgather(digest)
