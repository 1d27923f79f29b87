"""Chooses the threads and processes that prepare batches, from the cores."""

import math
import os
import pathlib
import shutil

from selfboottok_jax import errors
from selfboottok_jax.data import picture_set, sources, token_cache, workers

BY_CORES = -1
# A worker's Python runs one thread at a time. Decoding and resizing release it
# for most of an image's time, which keeps so many threads busy.
THREADS = 4
# More threads in one process wait for each other.
MOST_THREADS = 16
# With fewer cores the processes would take them from the training.
LEAST_CORES = 8
# Left to the loop, the log and the transfers.
RESERVED_CORES = 2
MOST_WORKERS = 16
# Processes take seconds to start, in which threads read as many pictures or
# cached records.
LEAST_PICTURES = 10_000
LEAST_RECORDS = 50_000
_SHARED_MEMORY = pathlib.Path('/dev/shm')
# Time that a container may compute, and per what time, in microseconds.
_QUOTA = pathlib.Path('/sys/fs/cgroup/cpu.max')


def core_ids() -> frozenset[int]:
  """The cores that the system lets this process use."""
  if hasattr(os, 'sched_getaffinity'):
    return frozenset(os.sched_getaffinity(0))
  return frozenset(range(os.cpu_count() or 1))


def count_cores(shared_by: int = 1) -> int:
  """Number of cores that this process may use, at least 1.

  A container's quota counts too, where there is one (of cgroups, version 2).

  Args:
    shared_by: number of busy processes that have the same cores.
  """
  cores: float = len(core_ids())
  try:
    allowed, period = _QUOTA.read_text().split()
    cores = min(cores, int(allowed) / int(period))
  except (OSError, ValueError):  # no container, or 'max': no quota
    pass
  return max(1, math.floor(cores / shared_by))


def free_shared_memory() -> float | int:
  """Bytes that processes can still share; infinite where nothing limits it.

  Linux has memory that is in no file system; /dev/shm, of which a container
  may have 64 MB, counts without it.
  """
  if workers.HAS_MEMFD or not _SHARED_MEMORY.is_dir():
    return math.inf
  return shutil.disk_usage(_SHARED_MEMORY).free


def choose(
  source: sources.Source,
  num_threads: int = BY_CORES,
  num_workers: int = BY_CORES,
  *,
  shared_by: int = 1,
  batch_bytes: int = 0,
) -> tuple[int, int]:
  """Returns the numbers of threads and of worker processes for a source.

  Numbers that are given stay. Those that are BY_CORES follow from the c cores
  that `count_cores` finds:

  - no workers for fewer than LEAST_CORES cores, for little data, and for
    scenes that are drawn; else a worker for every THREADS of c -
    RESERVED_CORES, up to MOST_WORKERS;
  - THREADS threads in each worker; without workers c threads, from THREADS up
    to MOST_THREADS.

  Args:
    source: what is read.
    num_threads: threads of this process, or of each worker.
    num_workers: worker processes.
    shared_by: see `count_cores`.
    batch_bytes: size of a batch of this process. Workers hand batches over in
      shared memory: where that is limited and does not hold two of each, there
      are none.

  Raises:
    ConfigError: a number below -1.
  """
  for name, given in (
    ('data.num_threads', num_threads),
    ('data.num_workers', num_workers),
  ):
    errors.require(given >= BY_CORES, name, given, '0 or more, or -1: by cores')
  cores = count_cores(shared_by)
  if num_workers == BY_CORES:
    # As many workers as keep the cores busy with the threads that they have.
    each = THREADS if num_threads == BY_CORES else max(num_threads, 1)
    num_workers = 0
    if cores >= LEAST_CORES and _is_large(source):
      wanted = (cores - RESERVED_CORES) // each
      num_workers = min(max(wanted, 1), MOST_WORKERS)
      if 2 * num_workers * shared_by * batch_bytes > free_shared_memory():
        num_workers = 0
  if num_threads == BY_CORES:
    num_threads = THREADS
    if not num_workers:
      num_threads = min(max(cores, THREADS), MOST_THREADS)
  return num_threads, num_workers


def _is_large(source: sources.Source) -> bool:
  """True if reading it all takes far longer than workers take to start."""
  if isinstance(source, token_cache.TokenCache):
    return len(source) >= LEAST_RECORDS
  # Others, as drawn scenes, may not be what another process can be given.
  return (
    isinstance(source, picture_set.PictureSource)
    and len(source) >= LEAST_PICTURES
  )
