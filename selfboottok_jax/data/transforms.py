"""From a decoded picture to what a model sees."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, '_ _ 3']
# What is decoded but not yet copied into an array saves two copies.
Picture = Pixels | Image.Image


def resize_shorter(image: Picture, size: int) -> Pixels:
  """Resizes so that the shorter side is `size`, as ADM does.

  The picture is halved by box filters while twice as large as wanted, then
  resized bicubically.
  """
  return np.asarray(_resize(image, size))


def center_crop(
  image: Picture, size: int
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """ADM's evaluation crop: shorter side to `size`, then the middle."""
  return np.asarray(_center_crop(image, size))


def _center_crop(image: Picture, size: int) -> Picture:
  image = _resize(image, size)
  rows, columns = _sizes(image)
  return _cut(image, (rows - size) // 2, (columns - size) // 2, size)


def _resize(image: Picture, size: int) -> Picture:
  if min(_sizes(image)) == size:
    return image
  picture = image
  if not isinstance(picture, Image.Image):
    picture = Image.fromarray(picture)
  while min(picture.size) >= 2 * size:
    half = (picture.width // 2, picture.height // 2)
    picture = picture.resize(half, Image.Resampling.BOX)
  scale = size / min(picture.size)
  whole = (round(picture.width * scale), round(picture.height * scale))
  return picture.resize(whole, Image.Resampling.BICUBIC)


def _cut(image: Picture, top: int, left: int, size: int) -> Picture:
  if isinstance(image, Image.Image):
    return image.crop((left, top, left + size, top + size))
  return image[top : top + size, left : left + size]


def _sizes(image: Picture) -> tuple[int, int]:
  """Rows and columns."""
  if isinstance(image, Image.Image):
    return image.height, image.width
  return image.shape[0], image.shape[1]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Random scale and crop, or the centre; then flip. Images stay uint8.

  Attributes:
    image_size: pixels a side of the result.
    max_scale: with a random crop, the shorter side becomes a random integer in
      [image_size, max_scale * image_size].
    flip: whether every other picture is mirrored.
    random_crop: whether the square is cut anywhere, or as in evaluation.
  """

  image_size: int
  max_scale: float = 1.25
  flip: bool = True
  random_crop: bool = True

  def __call__(
    self, element: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Augments one element of a source."""
    size, image = self.image_size, element['image']
    if self.random_crop:
      shorter = rng.integers(size, int(self.max_scale * size) + 1)
      image = _resize(image, int(shorter))
      rows, columns = _sizes(image)
      top = int(rng.integers(rows - size + 1))
      left = int(rng.integers(columns - size + 1))
      image = _cut(image, top, left, size)
    else:
      image = _center_crop(image, size)
    if mirrors(self.flip, rng):
      image = mirror(image)
    return {
      'image': np.asarray(image),
      'label': np.int32(element['label']),
    }


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
