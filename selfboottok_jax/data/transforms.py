"""From a decoded picture to what a model sees."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, '_ _ 3']


def resize_shorter(image: Pixels, size: int) -> Pixels:
  """Resizes so that the shorter side is `size`, as ADM does.

  The picture is halved by box filters while twice as large as wanted, then
  resized bicubically.
  """
  if min(image.shape[:2]) == size:
    return image
  picture = Image.fromarray(image)
  while min(picture.size) >= 2 * size:
    half = (picture.width // 2, picture.height // 2)
    picture = picture.resize(half, Image.Resampling.BOX)
  scale = size / min(picture.size)
  whole = (round(picture.width * scale), round(picture.height * scale))
  return np.asarray(picture.resize(whole, Image.Resampling.BICUBIC))


def center_crop(
  image: Pixels, size: int
) -> UInt8[np.ndarray, '{size} {size} 3']:
  """ADM's evaluation crop: shorter side to `size`, then the middle."""
  image = resize_shorter(image, size)
  top = (image.shape[0] - size) // 2
  left = (image.shape[1] - size) // 2
  return image[top : top + size, left : left + size]


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
      image = resize_shorter(image, int(shorter))
      top = rng.integers(image.shape[0] - size + 1)
      left = rng.integers(image.shape[1] - size + 1)
      image = image[top : top + size, left : left + size]
    else:
      image = center_crop(image, size)
    if mirrors(self.flip, rng):
      image = mirror(image)
    return {
      'image': image,
      'label': np.int32(element['label']),
    }


def mirror(image: Pixels) -> Pixels:
  """Mirrors left and right."""
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
