"""Photographs of a folder tree, or of a tar of one."""

import functools
import io
import os
import pathlib
import struct
import tarfile
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.data import layout, transforms

# What Pillow raises on damaged files, by format.
_DECODE_ERRORS = (
  OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error,
  zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class PhotoSource:
  """Pictures of one split of a folder tree, by index."""

  max_scale = 1.25

  def __init__(
    self,
    path: str,
    split: str,
    chosen: layout.Layout,
    read: Callable[[int], bytes],
  ):
    """Serves the pictures of `chosen`; `read` gives a file's bytes."""
    self._path, self._split, self._read = path, split, read
    self._files = chosen.files
    self._labels = np.asarray(chosen.labels, np.int32)
    self.class_names = chosen.class_names
    self.fingerprint = chosen.fingerprint

  def __len__(self) -> int:
    """Number of pictures."""
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one: {'image': uint8 [h, w, 3], 'label': int}."""
    name = f'{self._path}/{self._files[index]}'
    image = decode_image(self._read(index), name)
    return {'image': image, 'label': int(self._labels[index])}

  # grain prints its sources, and a path is all that a reader wants to see.
  def __repr__(self) -> str:
    """The path and the split."""
    return f'{self._path} ({self._split})'


def open_folder(path: str, split: str) -> PhotoSource:
  """Lists a folder tree; DataError where `layout.arrange` says so."""
  sizes, folders = _list_folder(path)
  chosen = layout.arrange(sizes, folders, split, path)
  return PhotoSource(path, split, chosen, FolderReader(path, chosen.files))


def open_tar(path: str, split: str) -> PhotoSource:
  """Reads a tar's headers; DataError if it is damaged or has none."""
  stat = os.stat(path)
  spans, folders = _index_tar(path, stat.st_size, stat.st_mtime_ns)
  sizes = {name: size for name, (_, size) in spans.items()}
  chosen = layout.arrange(sizes, folders, split, path)
  reader = TarReader(path, [spans[file] for file in chosen.files])
  return PhotoSource(path, split, chosen, reader)


class FolderReader:
  """Files below a folder, one a picture."""

  def __init__(self, path: str, files: Sequence[str]):
    """Reads `files`, given relative to `path`."""
    self._path, self._files = path, files

  def __call__(self, index: int) -> bytes:
    """The bytes of a file; DataError if it has gone since."""
    file = pathlib.Path(self._path, self._files[index])
    try:
      return file.read_bytes()
    except OSError as error:
      raise errors.DataError(
        f'cannot read {file}: {error.strerror}; it was there at the start: '
        'restore it, or start again without it'
      ) from error


class TarReader:
  """Spans of one open file.

  Reads are os.pread on one descriptor, which has no shared position, so any
  number of threads may read; a pickled copy opens the file again.
  """

  def __init__(self, path: str, spans: Sequence[tuple[int, int]]):
    """Opens the tar; `spans` are (offset, bytes)."""
    self._path, self._spans = path, np.asarray(spans, np.int64)
    self._open()

  def __call__(self, index: int) -> bytes:
    """The bytes of a span."""
    offset, size = self._spans[index].tolist()
    return os.pread(self._descriptor, size, offset)

  def _open(self) -> None:
    self._descriptor = os.open(self._path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)

  def __getstate__(self) -> dict[str, Any]:
    """Leaves the descriptor, which is this process's own, behind."""
    return {k: v for k, v in vars(self).items() if k != '_descriptor'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Opens the tar again."""
    vars(self).update(state)
    self._open()


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, 'h w 3']:
  """Decodes a picture; EXIF orientation is ignored, as in ADM's protocol.

  Raises:
    DataError: `data` is no image; names `name`.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      return np.asarray(transforms.to_rgb(image))
  except _DECODE_ERRORS as error:
    raise errors.DataError(
      f'{name} is no image that can be read ({len(data)} bytes); '
      'replace it or take it out'
    ) from error


def _list_folder(path: str) -> tuple[dict[str, int], set[str]]:
  sizes, folders, seen = {}, set(), {os.path.realpath(path)}
  root = pathlib.Path(path)
  for where, below, names in os.walk(path, followlinks=True, onerror=_refuse):
    # A link that leads back would show the same pictures again.
    real = {name: os.path.realpath(os.path.join(where, name)) for name in below}
    below[:] = [name for name in sorted(below) if real[name] not in seen]
    seen |= {real[name] for name in below}
    relative = pathlib.Path(where).relative_to(root)
    folders.add(relative.as_posix())
    for name in names:
      file = (relative / name).as_posix()
      full = os.path.join(where, name)
      # A dangling link has no size, and a tar of the tree no data for it.
      if layout.is_image(file) and os.path.isfile(full):
        sizes[file] = os.path.getsize(full)
  return sizes, folders


def _refuse(error: OSError) -> None:
  raise errors.DataError(
    f'cannot list {error.filename}: {error.strerror}; make it readable, or '
    'take it out'
  ) from error


# Train and val are mostly opened one after the other, and walking the headers
# of a large tar takes minutes; size and time tell whether it is the same one.
@functools.lru_cache(maxsize=2)
def _index_tar(
  path: str, size: int, changed: int
) -> tuple[Mapping[str, tuple[int, int]], frozenset[str]]:
  """Every picture's (offset, bytes), and all folders."""
  del changed  # only part of the key
  spans, folders = {}, set()
  try:
    with tarfile.open(path, 'r:') as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # a million headers are a gigabyte
        name = pathlib.PurePosixPath(member.name).as_posix().lstrip('/')
        if member.isdir():
          folders.add(name)
        elif layout.is_image(name) and member.islnk():
          target = pathlib.PurePosixPath(member.linkname).as_posix()
          if target in spans:
            spans[name] = spans[target]
        elif layout.is_image(name) and member.isreg():
          spans[name] = (member.offset_data, member.size)
  except tarfile.TarError as error:
    raise errors.DataError(
      f'{path} is no tar, or is cut short ({size} bytes, {error}); '
      'copy or download it again'
    ) from error
  if any(offset + length > size for offset, length in spans.values()):
    raise errors.DataError(
      f'{path} is cut short at {size} bytes; copy or download it again'
    )
  return spans, frozenset(folders)
