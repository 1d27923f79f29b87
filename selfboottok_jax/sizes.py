"""Sizes of images: a whole number for a square, or (height, width).

A configuration, an index or a command line gives a size in any of its forms;
`canonical` makes it the one that is compared, stored and hashed.
"""

import abc
import operator
from typing import Any, TypeAlias

from selfboottok_jax import errors

# In canonical form: a square is its side, never a pair.
Size: TypeAlias = int | tuple[int, int]


class AnySize(abc.ABC):  # noqa: B024 (others register as its subclasses)
  """The type of a configuration's field that holds a size.

  `isinstance` accepts what may stand there: whole numbers, tuples, and the
  lists that JSON makes of them.
  """


for _form in (int, tuple, list):
  AnySize.register(_form)


def canonical(size: Any, name: str = 'data.image_size') -> Size:
  """A size as the side of a square, or else as (height, width).

  Args:
    size: a whole number of pixels, or two of them, height first.
    name: the key that it was given by, for errors.

  Raises:
    ConfigError: anything else, or less than a pixel.
  """
  given = size if isinstance(size, list | tuple) else (size,)
  try:
    sides = tuple(operator.index(side) for side in given)
  except TypeError:
    sides = ()
  fits = len(sides) in (1, 2) and min(sides) >= 1
  # True is an index as well.
  fits = fits and not any(isinstance(side, bool) for side in given)
  wanted = 'pixels a side, 1 or more, or two of them as (height, width)'
  errors.require(fits, name, size, wanted)
  if len(sides) == 1 or sides[0] == sides[1]:
    return sides[0]
  return sides[0], sides[1]


def pair(size: Size) -> tuple[int, int]:
  """(height, width) of a size."""
  return (size, size) if isinstance(size, int) else size


def grid(size: Size, patch_size: int) -> tuple[int, int]:
  """Rows and columns of whole patches in an image."""
  height, width = pair(size)
  return height // patch_size, width // patch_size


def describe(size: Size) -> str:
  """HEIGHTxWIDTH, for logs and reports."""
  height, width = pair(size)
  return f'{height}x{width}'


def as_flag(size: Size) -> str:
  """The value of a flag, which no shell takes apart: 64, or 96,64."""
  return str(size) if isinstance(size, int) else f'{size[0]},{size[1]}'


def parse(text: str) -> Any:
  """Reads '64', '96,64', '(96, 64)' or '96x64'; returns other texts as given.

  Whether what was read is a size is for `canonical` to say.
  """
  parts = text.strip().strip('()[]').replace('x', ',').split(',')
  try:
    sides = tuple(int(part) for part in parts if part.strip())
  except ValueError:
    return text
  return sides[0] if len(sides) == 1 else sides
