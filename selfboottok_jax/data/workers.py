"""Processes that prepare batches and hand them over in shared memory.

The memory has no name: nothing of it can be left behind, however a process
ends, and the size of /dev/shm does not limit it. What a worker needs to know,
it hears over a pipe that ends with the training, by kill -9 too. Workers leave
the signals of a terminal or a scheduler to the process that trains.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, reduction, resource_tracker, util
from typing import Any, NamedTuple

import cloudpickle

from selfboottok_jax import errors

Batch = dict[str, Any]
Make = Callable[[int], Iterable[Batch]]
# Batches in the shared memory of a worker: one is being filled, the others are
# read. Who keeps more gets copies.
SLOTS = 3
HAS_MEMFD = hasattr(os, 'memfd_create')
# Arrays begin where vector instructions, and JAX on a CPU, want them.
_ALIGNMENT = 64
# Beside the arrays whose sizes are known: labels, masks and the gaps.
_SPARE = 2**16
_SIGNALS = {
  getattr(signal, name)
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
  if hasattr(signal, name)
}


class Workers(Iterator[Batch]):
  """Batches from worker processes, in a fixed order.

  Batch i is the next one of worker i modulo their number.
  """

  def __init__(self, make: Make, *, count: int, batch_bytes: int):
    """Starts `count` processes.

    Args:
      make: called with a worker's number in its process; yields its batches.
        It is pickled, by value what another process cannot import.
      count: processes.
      batch_bytes: size of the arrays of a batch. What is larger is sent
        through the pipe, which takes longer.
    """
    pickled = cloudpickle.dumps(make)
    program = _Memory(len(pickled))
    program.map[:] = pickled
    size = batch_bytes + _SPARE
    size += -size % mmap.PAGESIZE
    # Or it would be started below, and unblock the signals.
    resource_tracker.ensure_running()
    # A signal for the whole process group must not end a worker before it has
    # said that it ignores it. Processes inherit what is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
      self._workers = [_Worker(i, program, size) for i in range(count)]
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    self._turn = 0
    # Before multiprocessing asks what still runs to end and waits for it.
    self._finalizer = util.Finalize(
      self, _stop, args=(self._workers,), exitpriority=100
    )

  def __next__(self) -> Batch:
    """The next batch, of arrays in shared memory; they may be kept.

    Raises:
      DataError: a worker was killed, or could not start.
      StopIteration: after the last batch, or once closed.
      Exception: whatever making the batch raised, in the worker.
    """
    if not self._workers:
      raise StopIteration
    worker = self._workers[self._turn]
    try:
      return worker.receive()
    except BaseException:
      self.close()
      raise
    finally:
      self._turn = (self._turn + 1) % max(len(self._workers), 1)

  def close(self) -> None:
    """Ends the processes at once; may be called again."""
    self._finalizer()


class _Filled(NamedTuple):
  """A batch in a slot: its pickle, and where the arrays of it lie."""

  slot: int
  pickled: bytes
  spans: list[tuple[int, int]]


class _Failed(NamedTuple):
  """The exception that ended a worker."""

  error: BaseException


class _Worker:
  """One process, and this end of its pipe."""

  def __init__(self, index: int, program: '_Memory', size: int):
    context = multiprocessing.get_context('spawn')
    self._pipe, theirs = context.Pipe()
    self._memory, self._size = _Memory(SLOTS * size), size
    self._lent: set[int] = set()
    self._process = context.Process(
      target=_run,
      args=(index, program, self._memory, size, theirs),
      daemon=True,
      name=f'data worker {index}',
    )
    self._process.start()
    # The end of the process is now the end of the pipe.
    theirs.close()
    for slot in range(SLOTS):
      self._release(slot)

  def receive(self) -> Batch:
    """Its next batch; see `Workers.__next__`."""
    try:
      message = self._pipe.recv()
    except (EOFError, OSError):
      raise errors.DataError(self._describe_end()) from None
    if message is None:
      raise StopIteration
    if isinstance(message, _Failed):
      raise message.error
    slot, pickled, spans = message
    keep = len(self._lent) < SLOTS - 1
    buffers: list[Any] = []
    # One object whose end tells that nobody reads the slot any more.
    whole = (ctypes.c_char * self._size).from_buffer(
      self._memory.map, slot * self._size
    )
    view = memoryview(whole).cast('B')
    for start, size in spans:
      part = view[start : start + size]
      buffers.append(part if keep else bytearray(part))
    if keep:
      self._lent.add(slot)
      weakref.finalize(whole, self._release, slot).atexit = False
    else:
      self._release(slot)
    return pickle.loads(pickled, buffers=buffers)

  def stop(self) -> None:
    """Kills the process: it has nothing to put away."""
    self._process.kill()
    self._process.join()
    self._pipe.close()

  def _release(self, slot: int) -> None:
    self._lent.discard(slot)
    # One small write, which threads cannot mix. The process may have ended.
    with contextlib.suppress(OSError):
      self._pipe.send_bytes(bytes([slot]))

  def _describe_end(self) -> str:
    self._process.join(5)
    code = self._process.exitcode
    if code is None or code >= 0:
      return (
        f'a data worker ended by itself (exit code {code}), for a reason that '
        'it printed above; in a program of your own, start trainings below '
        "if __name__ == '__main__', or set data.num_workers=0"
      )
    name = signal.Signals(-code).name
    return (
      f'a data worker was killed ({name}), perhaps because memory ran out; '
      'lower data.num_workers or data.batch_size, and give the same command '
      'again'
    )


class _Memory:
  """Shared memory that other processes get through their start alone."""

  def __init__(self, size: int, descriptor: int | None = None):
    """Makes `size` bytes of zeros, or opens those of another process."""
    if descriptor is None:
      descriptor = _nameless()
      os.ftruncate(descriptor, size)
    self._descriptor, self._size = descriptor, size
    self.map = mmap.mmap(descriptor, size)
    weakref.finalize(self, os.close, descriptor)

  def __reduce__(self) -> tuple[Any, ...]:
    """To be unpickled by a process that this one starts."""
    return _open, (self._size, reduction.DupFd(self._descriptor))


def _nameless() -> int:
  """Descriptor of an empty file in memory or, without such files, on disk."""
  if HAS_MEMFD:
    return os.memfd_create('batches')
  memory = '/dev/shm'
  where = memory if os.path.isdir(memory) else None
  with tempfile.TemporaryFile(dir=where) as file:
    return os.dup(file.fileno())


def _open(size: int, descriptor: Any) -> _Memory:
  return _Memory(size, descriptor.detach())


def _stop(workers: list[_Worker]) -> None:
  while workers:
    workers.pop().stop()


def _run(
  index: int,
  program: _Memory,
  memory: _Memory,
  size: int,
  pipe: connection.Connection,
) -> None:
  """Makes batches until the pipe ends."""
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
  free: list[int] = []
  try:
    batches = cloudpickle.loads(program.map[:])(index)
    for batch in batches:
      # The lowest free slot: what is never needed takes no memory.
      while not free or pipe.poll():
        free.append(pipe.recv_bytes()[0])
      slot = min(free)
      free.remove(slot)
      place = memoryview(memory.map)[slot * size : (slot + 1) * size]
      pipe.send(_write(slot, place, batch))
    pipe.send(None)
    # Until it is closed: an end would be taken for a fault.
    while True:
      pipe.recv_bytes()
  except BaseException as error:  # noqa: BLE001 - raised in the other process
    with contextlib.suppress(OSError):
      pipe.send(_Failed(_portable(error)))
      while True:
        pipe.recv_bytes()
  finally:
    # Threads may still be decoding; nobody waits for what they do.
    os._exit(0)


def _write(slot: int, place: memoryview, batch: Batch) -> _Filled:
  """Writes the arrays of a batch into a slot, as far as they fit."""
  end, spans = 0, []

  def take(buffer: pickle.PickleBuffer) -> bool:
    """Returns True for what is to be pickled in place."""
    nonlocal end
    raw = buffer.raw()
    if end + raw.nbytes > len(place):
      return True
    place[end : end + raw.nbytes] = raw
    spans.append((end, raw.nbytes))
    end += raw.nbytes + -raw.nbytes % _ALIGNMENT
    return False

  pickled = pickle.dumps(batch, protocol=5, buffer_callback=take)
  return _Filled(slot, pickled, spans)


def _portable(error: BaseException) -> BaseException:
  """The error, or one that says the same where it cannot be pickled."""
  if not isinstance(error, errors.UserError):
    where = ''.join(traceback.format_exception(error))
    error.add_note(f'in a data worker:\n{where}')
  try:
    return pickle.loads(pickle.dumps(error))
  except Exception:  # noqa: BLE001 - classes pickle as they like
    return RuntimeError(f'in a data worker: {error!r}')
