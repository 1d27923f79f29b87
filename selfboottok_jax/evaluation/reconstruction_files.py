"""Reconstructions on disk, named as their originals: a folder or an .npz."""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import errors, files
from selfboottok_jax.data import cores
from selfboottok_jax.evaluation import image_sets, npz_files, pictures


def check(path: str | os.PathLike[str], flag: str) -> None:
  """Checks that reconstructions can be written there.

  Raises:
    ConfigError: a place that cannot be written, or a folder that holds
      something.
  """
  place = files.as_path(path)
  if place.suffix == '.npz':
    files.check_file(flag, path)
    return
  files.check_folder(flag, path)
  if not files.is_vacant(place):
    raise errors.ConfigError(
      f'--{flag}={path} is not empty; choose a new folder, nothing is '
      'overwritten'
    )


@contextlib.contextmanager
def writing(
  path: str | os.PathLike[str],
  names: Sequence[str],
  image_size: tuple[int, int],
) -> Iterator['Writer']:
  """Opens a folder of .png files, or an .npz file with arr_0 and names.

  Args:
    path: where to; an .npz file appears whole when the block ends.
    names: of the originals, of all images in the order in which they come.
    image_size: (height, width).
  """
  place, own = files.as_path(path), image_sets.image_names(names)
  if place.suffix != '.npz':
    yield Writer(place, own, None)
    return
  shape = (len(names), *image_size, 3)
  with npz_files.writing(place, shape, {image_sets.NAMES: own}) as file:
    yield Writer(place, own, file)


class Writer:
  """Takes the images one batch after the other."""

  def __init__(self, place: files.Path, names: Sequence[str], file: Any):
    """Writes into the folder `place`, or all bytes into `file`, not None."""
    self._place, self._names, self._file = place, names, file
    self._count = 0

  def add(self, images: UInt8[np.ndarray, 'b h w 3']) -> None:
    """Writes the next images."""
    names = self._names[self._count : self._count + len(images)]
    self._count += len(images)
    if self._file is not None:
      self._file.write(images.tobytes())
      return
    with concurrent.futures.ThreadPoolExecutor(cores.count_cores()) as pool:
      list(pool.map(self._save, names, images))

  def _save(self, name: str, image: UInt8[np.ndarray, 'h w 3']) -> None:
    pictures.save_png(self._place / name, image)
