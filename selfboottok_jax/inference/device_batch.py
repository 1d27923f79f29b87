"""Chooses how many samples a device computes at a time, from its memory."""

from collections.abc import Callable, Sequence

import jax

# Default number where nothing is measured.
ON_CPU, ELSEWHERE = 4, 32
# The largest number that was ever timed.
MOST = 256
# Left to the allocator, whose free memory is not all in one piece.
USABLE = 0.9


def default(devices: Sequence[jax.Device]) -> int:
  """Returns a modest number that needs no look at memory."""
  return ON_CPU if devices[0].platform == 'cpu' else ELSEWHERE


def memory_limit(devices: Sequence[jax.Device]) -> int | None:
  """Bytes that programs may use on each device; None if they do not say."""
  limits = [
    (device.memory_stats() or {}).get('bytes_limit') for device in devices
  ]
  known = [limit for limit in limits if limit]
  if len(known) < len(limits):
    return None
  return int(USABLE * min(known))


def largest_that_fits(
  needed: Callable[[int], int | None], limit: int, most: int = MOST
) -> int:
  """Returns the largest power of two whose programs fit, at least 1.

  Args:
    needed: from a number of samples to the bytes of their compiled programs;
      None for programs that the compiler found too large for the device.
    limit: bytes that there are.
    most: largest number to try; the result is this or less.
  """
  size = 1 << (most.bit_length() - 1)
  while size > 1:
    tried, found = size, needed(size)
    if found is not None and found <= limit:
      return size
    size //= 2
    # Compiling takes up to a minute, so sizes that cannot fit are passed over:
    # memory grows no faster than the number of samples, so half of them take
    # half of it at least.
    while found is not None and size > 1 and found * size > limit * tried:
      size //= 2
  return 1
