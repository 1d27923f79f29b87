"""Keeps account of the arrays of a record that a test compares."""

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.golden import fixtures


class Record:
  """A fixture whose results are compared, each by its name."""

  def __init__(self, kind: str, name: str):
    fixture = fixtures.load(kind, name)
    self.name, self.meta = name, fixture.meta
    self.arrays, self.weights = fixture.arrays, fixture.weights
    self.seen: set[str] = set()

  def check(self, array: str, actual: Any, error: Any = None) -> None:
    """Asserts `actual` within the tolerance tabled for the array.

    With `error`, of `rounding`, within that instead.
    """
    expected = self.read(array)
    if error is None:
      fixtures.check(self.name, array, actual, expected)
    else:
      label = f'{self.name}:{array}'
      fixtures.check_rounding(label, actual, expected, error)

  def refuse(self, array: str, wrong: Any, error: Any, times: float) -> None:
    """Asserts that a wrong formula's result misses by `times` the error."""
    found = fixtures.excess(wrong, self.read(array), error)
    assert found > times, f'{self.name}:{array}: only {found:.1f} times'

  def check_rows(self, array: str, actual: Any) -> None:
    """Checks the first rows of an array; see `check`."""
    expected = self.read(array)[: len(actual)]
    fixtures.check(self.name, array, actual, expected)

  def read(self, array: str) -> np.ndarray:
    """A result that says what others are, or that is compared elsewhere."""
    self.seen.add(array)
    return self.arrays[array]


@contextlib.contextmanager
def opened(
  name: str, left_out: Mapping[str, str] | None = None, kind: str = 'generator'
) -> Iterator[Record]:
  """A record of which every result has to be compared in the block.

  `left_out` names the others, as patterns, each with the reason.
  """
  record = Record(kind, name)
  yield record
  results = {array for array in record.arrays if array.startswith('out')}
  missed = results - record.seen
  for pattern, reason in (left_out or {}).items():
    excused = set(fnmatch.filter(missed, pattern))
    assert excused, f'{name}: nothing is left out by {pattern} ({reason})'
    missed -= excused
  assert not missed, f'{name}: not compared: {sorted(missed)}'
