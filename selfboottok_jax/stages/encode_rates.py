"""How fast a cache is written, beside how fast its encoder alone would be."""

import threading
import time
from collections.abc import Callable
from typing import Any

from selfboottok_jax import data

# Batches between two timings of the encoder, and batches of a timing.
EVERY, TIMED = 16, 8


class Rates:
  """Clocks for the two, which take turns so that they meet the same machine.

  While the encoder is timed nothing is decoded and nothing written, and that
  time is left out of the writing. All else counts, from the wait for the first
  batch to the last rename.
  """

  def __init__(self, time_encoder: Callable[[int], float], batch_size: int):
    """Starts the clock of the writing.

    Args:
      time_encoder: seconds for so many batches that lie on the devices.
      batch_size: images in one of them.
    """
    self._time_encoder, self._batch_size = time_encoder, batch_size
    self._batches = self._images = self._timed = 0
    self._idle = threading.Event()
    self._idle.set()
    self._paused, self._began = 0.0, time.monotonic()

  def gated(self, source: data.Source) -> '_Gated':
    """A source that waits while the encoder is timed."""
    return _Gated(source, self._idle)

  def due(self) -> bool:
    """Whether the encoder is to be timed after this batch."""
    self._batches += 1
    return self._batches % EVERY == 0

  def take(self) -> None:
    """Times the encoder; the caller has let all its own work end."""
    self._idle.clear()
    self._paused += self._time_encoder(TIMED)
    self._timed += TIMED * self._batch_size
    self._idle.set()

  def add(self, images: int) -> None:
    """So many more are written."""
    self._images += images

  def summary(self) -> str:
    """Both rates in images per second, and their ratio; ends the writing."""
    if not self._timed:
      self.take()
    spent = time.monotonic() - self._began - self._paused
    written, alone = self._images / spent, self._timed / self._paused
    return (
      f'written at {written:.1f} images/s, the encoder alone makes '
      f'{alone:.1f} images/s: {written / alone:.1%}'
    )


class _Gated:
  """Reads nothing while its gate is shut."""

  def __init__(self, source: data.Source, gate: threading.Event):
    self._source, self._gate = source, gate

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    self._gate.wait()
    return self._source[index]
