"""Reads .npz files that others made: never a pickle, and images in batches.

All that is wrong with a file is a DataError of one line.
"""

import contextlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any, TypeAlias

import numpy as np

from selfboottok_jax import errors, files

# The name of images in the files that ADM's evaluator reads.
IMAGES = 'arr_0'
# The first is what a type checker calls the second.
_Member: TypeAlias = IO[bytes] | zipfile.ZipExtFile
# The errors of reading a damaged archive; zipfile raises NotImplementedError
# for a damaged field that would name another compression.
_DAMAGE = (
  *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
  *(NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error),
)


class NpzFile:
  """The arrays of an .npz file, by name.

  Attributes:
    path: where it is.
    shapes: name of each array to its shape.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads what the arrays are, not their numbers.

    Raises:
      DataError: no such file, no .npz, one that was cut short, or one with
        objects, which would be code.
    """
    self.path = files.as_path(path)
    self.shapes: dict[str, tuple[int, ...]] = {}
    if not files.exists(self.path):
      raise errors.DataError(f'{path} does not exist; give an .npz file')
    with (
      self._reading(),
      self.path.open('rb') as opened,
      zipfile.ZipFile(opened) as archive,
    ):
      for info in archive.infolist():
        if not info.filename.endswith('.npy'):
          continue
        with archive.open(info) as file:
          shape, dtype, _ = _header(file)
          start = file.tell()
        name = info.filename.removesuffix('.npy')
        if dtype.hasobject:
          raise errors.DataError(
            f'{path} holds objects in {name}, which would be code; none was '
            'run: write plain arrays with numpy.savez'
          )
        if info.file_size - start != math.prod(shape) * dtype.itemsize:
          raise EOFError(f'{name} was cut short')
        self.shapes[name] = shape

  def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Reads one array; DataError if it is absent or has another shape."""
    self._check(name)
    if shape is not None and self.shapes[name] != shape:
      raise errors.DataError(
        f'{self.path}: {name} has the shape {self.shapes[name]}, wanted {shape}'
      )
    with self._open(name) as file:
      return np.lib.format.read_array(file, allow_pickle=False)

  def batches(
    self,
    batch_size: int,
    *,
    name: str = IMAGES,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields images as `data.EvalBatches` does, a batch at a time in memory.

    Args:
      batch_size: of all processes together.
      name: of the array, uint8 [n, h, w, 3].
      process_index: which rows of each batch.
      process_count: how many processes share a batch.

    Raises:
      DataError: no such array, or no images.
      ConfigError: a batch size that processes cannot share.
    """
    height, width = self.image_size(name)
    errors.require(
      batch_size > 0 and batch_size % process_count == 0,
      'batch_size',
      batch_size,
      f'a positive multiple of {process_count} processes',
    )
    share = batch_size // process_count
    with self._open(name) as file:
      _header(file)
      for first in range(0, self.shapes[name][0], batch_size):
        count = min(batch_size, self.shapes[name][0] - first)
        content = file.read(count * height * width * 3)
        pixels = np.frombuffer(content, np.uint8)
        images = pixels.reshape(count, height, width, 3)
        padding = ((0, batch_size - count), (0, 0), (0, 0), (0, 0))
        mine = slice(process_index * share, (process_index + 1) * share)
        yield {
          'image': np.pad(images, padding)[mine],
          'mask': (np.arange(batch_size) < count)[mine],
        }

  def image_size(self, name: str = IMAGES) -> tuple[int, int]:
    """(height, width) of its images; DataError if these are none."""
    self._check(name)
    with self._open(name) as file:
      shape, dtype, is_fortran = _header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
      raise errors.DataError(
        f'{self.path}: {name} is {dtype} {shape}; wanted images, uint8 '
        '[n, height, width, 3] in C order'
      )
    return shape[1], shape[2]

  def _check(self, name: str) -> None:
    if name not in self.shapes:
      raise errors.DataError(
        f'{self.path} has no array {name}, only '
        f'{", ".join(self.shapes) or "none"}'
      )

  @contextlib.contextmanager
  def _open(self, name: str) -> Iterator[_Member]:
    with (
      self._reading(),
      self.path.open('rb') as file,
      zipfile.ZipFile(file) as archive,
      archive.open(f'{name}.npy') as member,
    ):
      yield member

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    try:
      with files.reaching(self.path):
        yield
    except _DAMAGE as error:
      reason = ' '.join(str(error).split())[:120] or type(error).__name__
      raise errors.DataError(
        f'{self.path} is no .npz file, or is damaged or cut short ({reason}); '
        'copy it again'
      ) from error


@contextlib.contextmanager
def writing(
  path: files.Path, shape: tuple[int, ...], beside: Mapping[str, Any]
) -> Iterator[Any]:
  """Opens an .npz file whose images are written one after the other.

  It appears whole when the block ends, and is never in memory: fifty thousand
  images of 256 pixels are 10 GB.

  Args:
    path: the file.
    shape: of the array of images; the block writes as many bytes.
    beside: further arrays, by name.
  """
  with (
    files.writing(path) as whole,
    zipfile.ZipFile(whole, 'w', zipfile.ZIP_STORED) as archive,
  ):
    # ZIP64 in any case: the size is not known in advance.
    with archive.open(f'{IMAGES}.npy', 'w', force_zip64=True) as file:
      header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
      np.lib.format.write_array_header_2_0(file, header)
      yield file
    for name, array in beside.items():
      with archive.open(f'{name}.npy', 'w') as file:
        np.save(file, np.asarray(array))


def _header(
  file: _Member,
) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
  """Shape, type and whether in Fortran's order, of an array that follows."""
  version = np.lib.format.read_magic(file)
  read = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read is None:
    raise ValueError(f'version {version} of its arrays is not known')
  shape, is_fortran, dtype = read(file)
  return shape, dtype, is_fortran
