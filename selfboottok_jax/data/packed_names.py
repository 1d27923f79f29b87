"""A million names of pictures in two arrays."""

import collections.abc
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int

from selfboottok_jax.data import picture_set


class PackedNames(collections.abc.Sequence[str]):
  """Names that take their bytes and eight more each.

  As objects they would take a hundred more, in every process that reads, and a
  second to be sent there.
  """

  def __init__(self, names: Iterable[str]):
    """Packs names; bytes of a disk that are no text are kept."""
    encoded = [name.encode(*picture_set.UTF8) for name in names]
    self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    self._text = b''.join(encoded)

  def __len__(self) -> int:
    """Number of names."""
    return len(self._ends)

  @overload
  def __getitem__(self, index: int) -> str: ...

  @overload
  def __getitem__(self, index: slice) -> Sequence[str]: ...

  def __getitem__(self, index: int | slice) -> str | Sequence[str]:
    """Returns a name, or some of them."""
    if isinstance(index, slice):
      return self.take(np.arange(len(self))[index])
    index = range(len(self))[index]
    start = self._ends[index - 1] if index else 0
    return self._text[start : self._ends[index]].decode(*picture_set.UTF8)

  def take(self, indices: Int[np.ndarray, '_']) -> 'PackedNames':
    """Returns some of the names, packed."""
    return PackedNames(self[int(index)] for index in indices)
