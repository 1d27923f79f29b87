"""Small photographs, whole and damaged; and what a folder holds."""

import hashlib
import pathlib

import numpy as np
from PIL import Image


def write(folder: pathlib.Path, count: int) -> None:
  """Writes JPEGs of noise, 24 x 20 pixels."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(count)
  for index in range(count):
    pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f'{index}.jpg')


def truncate(file: pathlib.Path) -> None:
  """Keeps the first half of a file."""
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])


def contents(folder: pathlib.Path) -> dict[str, str]:
  """A digest of every file below a folder, to see that none has changed."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }
