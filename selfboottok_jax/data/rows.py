"""What a row of a batch is: of a picture, or of what a cache kept of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from selfboottok_jax.data import latents, sources, transforms

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainPictures:
  """Augmented pictures."""

  source: sources.Source
  transform: transforms.TrainTransform

  def __call__(self, index: int, rng: np.random.Generator) -> Row:
    """Reads and augments one."""
    return self.transform(self.source[index], rng)


@dataclasses.dataclass(frozen=True)
class TrainLatents:
  """Of every image either it or its mirror image."""

  source: latents.LatentSource
  flip: bool

  def __call__(self, index: int, rng: np.random.Generator) -> Row:
    """Reads one, mirrored where `TrainTransform` mirrors a centre crop."""
    return self.source.side(index, int(transforms.mirrors(self.flip, rng)))


@dataclasses.dataclass(frozen=True)
class EvalPictures:
  """Centre crops, uint8."""

  source: sources.Source
  image_size: int

  def __call__(self, index: int) -> Row:
    """Reads and crops one."""
    element = self.source[index]
    image = transforms.center_crop(element['image'], self.image_size)
    return {'image': image, 'label': np.int32(element['label'])}

  def blank(self) -> Row:
    """Padding: black, of class 0."""
    shape = (self.image_size, self.image_size, 3)
    return {'image': np.zeros(shape, np.uint8), 'label': np.int32(0)}


@dataclasses.dataclass(frozen=True)
class EvalLatents:
  """Images as they are."""

  source: latents.LatentSource

  def __call__(self, index: int) -> Row:
    """Reads one."""
    return self.source.side(index, 0)

  def blank(self) -> Row:
    """Padding: zeros, of class 0."""
    shapes = {
      name: self.source.index.shapes[name] for name in self.source.names
    }
    zeros = {name: np.zeros(s, np.float32) for name, s in shapes.items()}
    return {**zeros, 'label': np.int32(0)}


EvalRows = EvalPictures | EvalLatents


def train_rows(
  source: sources.Source,
  image_size: int,
  *,
  max_scale: float | None,
  flip: bool,
  random_crop: bool,
) -> Callable[[int, np.random.Generator], Row]:
  """What makes training rows of a source; ConfigError if it cannot."""
  if isinstance(source, latents.LatentSource):
    source.check_use(image_size, random_crop=random_crop)
    return TrainLatents(source, flip)
  scale = source.max_scale if max_scale is None else max_scale
  return TrainPictures(
    source, transforms.TrainTransform(image_size, scale, flip, random_crop)
  )


def eval_rows(source: sources.Source, image_size: int) -> EvalRows:
  """What makes evaluation rows of a source; ConfigError if it cannot."""
  if isinstance(source, latents.LatentSource):
    source.check_use(image_size, random_crop=False)
    return EvalLatents(source)
  return EvalPictures(source, image_size)
