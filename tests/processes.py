"""Processes of this machine, as the kernel shows them."""

import os
import pathlib
import time

PROC = pathlib.Path('/proc')


def runs(pid: int) -> bool:
  """Whether a process is there; one that ended and awaits its parent is not."""
  return _stat(pid)[:1] not in ([], ['Z'])


def children(pid: int) -> list[int]:
  """Processes that a process has started, and that are still there."""
  there = [int(f.name) for f in PROC.iterdir() if f.name.isdigit()]
  return sorted(p for p in there if _stat(p)[1:2] == [str(pid)])


def workers(pid: int) -> list[int]:
  """Data workers of a process: its children that multiprocessing spawned."""
  return [p for p in children(pid) if b'spawn_main' in _command(p)]


def resident(pid: int) -> int:
  """Bytes of memory that a process has to itself or shares."""
  pages = (PROC / str(pid) / 'statm').read_text().split()[1]
  return int(pages) * os.sysconf('SC_PAGE_SIZE')


def ended(pids: list[int], seconds: float = 30) -> bool:
  """Waits until none of the processes runs; False if some still do."""
  deadline = time.monotonic() + seconds
  while any(runs(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.05)
  return not any(runs(pid) for pid in pids)


def named_memory(pid: int) -> set[str]:
  """Segments of shared memory of a process that could outlive it."""
  maps = (PROC / str(pid) / 'maps').read_text().splitlines()
  return {
    line.split()[-1]
    for line in maps
    if '/dev/shm/' in line and not line.endswith('(deleted)')
  }


def _stat(pid: int) -> list[str]:
  """State, parent, ... of a process; empty once it is gone."""
  try:
    line = (PROC / str(pid) / 'stat').read_text()
  except OSError:
    return []
  # The name before may have blanks and brackets of its own.
  return line.rpartition(')')[2].split()


def _command(pid: int) -> bytes:
  try:
    return (PROC / str(pid) / 'cmdline').read_bytes()
  except OSError:
    return b''
