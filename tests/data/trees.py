"""Small trees of real image files."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

NAMES = tuple(
  f'{split}/{kind}/{i}.png'
  for split in ('train', 'val')
  for kind in ('cat', 'bee')
  for i in range(3)
)


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
  return Image.fromarray(pixels.astype(np.uint8))


def write(root: pathlib.Path, *names: str) -> pathlib.Path:
  """Writes a picture, seeded by its place in the list, under each name."""
  for seed, name in enumerate(names):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(file, 'PNG')
  return root


def pack(
  root: pathlib.Path, tar: pathlib.Path, top: str = '.', mode: str = 'w'
) -> pathlib.Path:
  with tarfile.open(tar, mode) as file:
    file.add(root, arcname=top)
  return tar


def png(seed: int) -> bytes:
  buffer = io.BytesIO()
  picture(seed).save(buffer, 'PNG')
  return buffer.getvalue()
