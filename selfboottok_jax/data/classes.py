"""Labels of pictures whose classes are stored as numbers or names."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from selfboottok_jax import errors

# Numbers of classes are labels as they are, so that a part of a data set has
# the labels of the whole. What is beyond is no class number.
_MOST = 100_000


@dataclasses.dataclass(frozen=True)
class Classes:
  """Classes of pictures.

  Attributes:
    labels: of each picture, an index into `names`; all 0 without classes.
    names: empty without classes.
    notes: see `picture_set.PictureSet`.
  """

  labels: Int[np.ndarray, '_']
  names: tuple[str, ...]
  notes: tuple[str, ...] = ()


def none(count: int, *notes: str) -> Classes:
  """Returns labels of pictures that have no classes."""
  return Classes(np.zeros(count, np.int32), (), notes)


def are_numbers(texts: Sequence[str]) -> bool:
  """True if all classes are whole numbers."""
  return all(re.fullmatch(r'-?[0-9]{1,9}', text) for text in texts)


def from_texts(
  codes: Int[np.ndarray, '_'],
  texts: Sequence[str],
  name: Callable[[int], str],
) -> Classes:
  """Returns labels of classes that are given as texts.

  Classes are sorted by name; if all are numbers, these are the labels.

  Args:
    codes: the class of each picture, an index into `texts`.
    texts: distinct classes.
    name: names a picture, for errors.

  Raises:
    DataError: numbers that cannot be labels.
  """
  if are_numbers(texts):
    values = np.array([int(text) for text in texts], np.int64)
    return from_numbers(values[codes], (), name)
  order = sorted(range(len(texts)), key=lambda i: texts[i])
  rank = np.empty(len(texts), np.int32)
  rank[order] = np.arange(len(texts))
  names = tuple(texts[i] for i in order)
  return Classes(rank[codes], names, text_order(names))


def text_order(names: Sequence[str]) -> tuple[str, ...]:
  """Notes sorted names with numbers that people would sort otherwise.

  As class_10, which comes before class_2.
  """

  def by_numbers(name: str) -> list[str | int]:
    # Texts and numbers take turns, so that like is compared with like.
    parts = re.split(r'([0-9]+)', name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)]

  for own, natural in zip(names, sorted(names, key=by_numbers), strict=True):
    if own != natural:
      return (f'classes are sorted as text: {own} comes before {natural}',)
  return ()


def from_numbers(
  values: Int[np.ndarray, '_'],
  names: Sequence[str],
  name: Callable[[int], str],
) -> Classes:
  """Returns labels of classes that are given as numbers from 0.

  Args:
    values: the class of each picture.
    names: of the classes; empty names them after their numbers.
    name: names a picture, for errors.

  Raises:
    DataError: a number below 0, or beyond the names.
  """
  most = len(names) or _MOST
  wrong = np.flatnonzero((values < 0) | (values >= most))
  if len(wrong):
    value = int(values[wrong[0]])
    hint = ', which means that it has no label' if value == -1 else ''
    raise errors.DataError(
      f'{name(int(wrong[0]))} is of class {value}{hint}; wanted a number from '
      f'0 to {most - 1:,} ({len(wrong):,} of {len(values):,} images have '
      'others)'
    )
  if names:
    return Classes(values.astype(np.int32), tuple(names))
  count = int(values.max()) + 1 if len(values) else 0
  notes = ['classes have numbers but no names']
  if absent := count - len(np.unique(values)):
    notes[0] += f', of which {absent:,} from 0 to {count - 1:,} have no images'
  return Classes(
    values.astype(np.int32), tuple(map(str, range(count))), tuple(notes)
  )
