"""From a decoded picture to what a model sees."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from selfboottok_jax import sizes

Pixels = UInt8[np.ndarray, '_ _ 3']
# What is decoded but not yet copied into an array saves two copies.
Picture = Pixels | Image.Image


# A picture this many times larger than what is cut out of it is resized in part
# only: the whole of a strip of 1 x 30,000 pixels would take gigabytes.
_LONG = 16


def cover(picture: tuple[int, int], size: sizes.Size) -> tuple[int, int]:
  """(height, width) at which a picture just covers `size`, its aspect kept.

  For a square that is a shorter side of `size`, as ADM has it.
  """
  (height, width), (rows, columns) = picture, sizes.pair(size)
  scale = max(rows / height, columns / width)
  return round(height * scale), round(width * scale)


def resize_and_crop(
  image: Picture,
  size: sizes.Size,
  crop: sizes.Size,
  place: Callable[[int, int], tuple[int, int]],
) -> Picture:
  """Resizes to cover `size`, as ADM does, and cuts `crop` out.

  The picture is halved by box filters while both sides are twice as long as
  wanted, then resized bicubically.

  Args:
    image: the picture, an array or Pillow's.
    size: what it covers after the resize; no smaller than `crop`.
    crop: height and width of the result.
    place: first row and column of the crop, from the rows and columns that are
      left over; called once.

  Returns:
    The crop: an array if `image` is one and has the right size already.
  """
  (rows, columns), (height, width) = sizes.pair(size), sizes.pair(crop)
  if isinstance(image, Image.Image):
    picture, whole = image, (image.height, image.width)
  else:
    picture, whole = None, (image.shape[0], image.shape[1])
  while whole[0] >= 2 * rows and whole[1] >= 2 * columns:
    if picture is None:
      picture = Image.fromarray(image)
    whole = whole[0] // 2, whole[1] // 2
    picture = picture.resize(whole[::-1], Image.Resampling.BOX)
  target = cover(whole, size)
  top, left = place(target[0] - height, target[1] - width)
  if target != whole:
    if picture is None:
      picture = Image.fromarray(image)
    if math.prod(target) > _LONG * height * width:
      return _resize_part(picture, target, (top, left), (height, width))
    picture = picture.resize(target[::-1], Image.Resampling.BICUBIC)
  if picture is None:
    assert isinstance(image, np.ndarray)
    return image[top : top + height, left : left + width]
  return picture.crop((left, top, left + width, top + height))


def _resize_part(
  picture: Image.Image,
  whole: tuple[int, int],
  first: tuple[int, int],
  size: tuple[int, int],
) -> Image.Image:
  """The part of a picture of `whole` rows and columns, which is never made.

  Args:
    picture: before the resize.
    whole: rows and columns after it.
    first: row and column at which the part begins.
    size: its rows and columns.
  """
  edges = []
  for axis in (1, 0):  # Pillow counts columns first.
    old, new = picture.size[1 - axis], whole[axis]
    ends = first[axis], first[axis] + size[axis]
    # Rounding must not lead beyond the picture.
    edges.append([min(end * old / new, old) for end in ends])
  (left, right), (top, bottom) = edges
  return picture.resize(
    size[::-1], Image.Resampling.BICUBIC, box=(left, top, right, bottom)
  )


def center_crop(image: Picture, size: sizes.Size) -> UInt8[np.ndarray, 'h w 3']:
  """ADM's evaluation crop: resized to cover `size`, then the middle.

  ADM's are squares; a rectangle is covered and cut in the same way. Pictures
  more than 16 times longer than wide are resized in part, and differ from ADM's
  at the edges of the part.
  """
  return np.asarray(resize_and_crop(image, size, size, _middle))


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Random scale and crop, or the centre; then flip. Images stay uint8.

  Attributes:
    image_size: pixels a side of the result, or (height, width).
    max_scale: with a random crop, the picture covers a rectangle whose shorter
      side is a random integer in [s, max_scale * s], where s is the shorter
      side of the result, and whose aspect is that of the result.
    flip: whether every other picture is mirrored.
    random_crop: whether the result is cut anywhere, or as in evaluation.
  """

  image_size: sizes.Size
  max_scale: float = 1.25
  flip: bool = True
  random_crop: bool = True

  def __call__(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Augments one element of a source."""
    size, image = self.image_size, element['image']
    if self.random_crop:
      image = resize_and_crop(
        image,
        self._draw_scale(rng),
        size,
        lambda rows, columns: (
          int(rng.integers(rows + 1)),
          int(rng.integers(columns + 1)),
        ),
      )
    else:
      image = resize_and_crop(image, size, size, _middle)
    if mirrors(self.flip, rng):
      image = mirror(image)
    return {
      'image': np.asarray(image),
      'label': np.int32(element['label']),
    }

  def _draw_scale(self, rng: np.random.Generator) -> tuple[int, int]:
    """Draws height and width of the rectangle that the picture covers."""
    height, width = sizes.pair(self.image_size)
    shorter = min(height, width)
    drawn = int(rng.integers(shorter, int(self.max_scale * shorter) + 1))
    # In whole numbers, so that the longer side is never rounded below its own.
    return height * drawn // shorter, width * drawn // shorter


def _middle(rows: int, columns: int) -> tuple[int, int]:
  """Where a crop in the middle begins, of so many rows and columns to spare."""
  return rows // 2, columns // 2


def mirror(image: Picture) -> Picture:
  """Mirrors left and right."""
  if isinstance(image, Image.Image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  # A view, image[:, ::-1], would be copied into the batch by runs of three
  # bytes, which takes nine times as long as channel by channel.
  mirrored = np.empty(image.shape, np.uint8)
  for channel in range(image.shape[-1]):
    mirrored[..., channel] = image[:, ::-1, channel]
  return mirrored


def mirrors(flip: bool, rng: np.random.Generator) -> bool:
  """Draws whether to mirror a picture: half of the time with `flip`.

  For centre crops this is the first draw and the only one, so that what a
  cache kept of them is mirrored where they would be.
  """
  return flip and bool(rng.random() < 0.5)
