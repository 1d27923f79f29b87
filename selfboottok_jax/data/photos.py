"""Photographs in a folder or a tar: splits, labels, and how they are read.

Splits and labels depend on relative paths alone, so that a folder and a tar of
the same tree give the same order, labels and split.
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import struct
import tarfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.data import transforms

IMAGE_SUFFIXES = frozenset({
  '.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
  '.webp',
})  # fmt: skip
SPLITS = ('train', 'val')
VAL_FRACTION = 0.1

Parts = tuple[str, ...]

# Names of a disk need not be text.
_UTF8 = ('utf-8', 'surrogateescape')


@dataclasses.dataclass(frozen=True)
class SplitFiles:
  """The pictures of one split.

  Attributes:
    files: keys of the tree's listing, sorted by class, then by path.
    labels: the class of each file, an index into `class_names`.
    class_names: sorted, the same for both splits; empty for a flat tree.
    fingerprint: sha256 of the paths, sizes and labels, as hex.
  """

  files: tuple[str, ...]
  labels: tuple[int, ...]
  class_names: tuple[str, ...]
  fingerprint: str


def is_image(path: str) -> bool:
  """Returns True for the relative path of a picture that is not hidden."""
  parts = pathlib.PurePosixPath(path).parts
  hidden = any(p.startswith('.') or p == '__MACOSX' for p in parts)
  return not hidden and pathlib.PurePosixPath(path).suffix.lower() in (
    IMAGE_SUFFIXES
  )


def in_validation(path: str) -> bool:
  """The split of a tree that has none: about 10 % of all paths."""
  digest = hashlib.sha256(path.encode(*_UTF8)).digest()
  return int.from_bytes(digest[:8], 'big') < VAL_FRACTION * 2**64


def arrange(
  sizes: Mapping[str, int], folders: Iterable[str], split: str, path: str
) -> SplitFiles:
  """Picks a split's pictures out of a listing.

  Args:
    sizes: bytes of every picture, by path relative to the tree, with '/'.
    folders: relative paths of all folders, with or without pictures: an empty
      val/ is an error where an absent one means a split by hash.
    split: 'train' or 'val'.
    path: the tree as the user named it, for errors.

  Returns:
    The files of the split. Folders that hold everything are passed over, so a
    single class is none; beside `train/` and `val/` nothing else counts.

  Raises:
    DataError: no pictures at all, none in the split, or pictures beside class
      folders.
  """
  if not sizes:
    raise errors.DataError(
      f'{path} holds no images; wanted files that end in '
      f'{" ".join(sorted(IMAGE_SUFFIXES))}: check the path'
    )
  trees = {file: pathlib.PurePosixPath(file).parts for file in sizes}
  folder_parts = {pathlib.PurePosixPath(folder).parts for folder in folders}
  trees, folder_parts = _strip_top(trees, folder_parts)
  members = _split_members(trees, folder_parts, path)
  classes = _class_names([p for part in members.values() for p in part], path)
  chosen = members[split]
  if not chosen:
    raise errors.DataError(
      f'the {split} split of {path} is empty ({len(sizes)} images in all); '
      f'put images into {split}/, or leave train/ and val/ out and give '
      'enough images for one in ten to be held out'
    )
  parts = sorted(chosen)
  label_of = {name: label for label, name in enumerate(classes)}
  labels = tuple(label_of[p[0]] if classes else 0 for p in parts)
  files = tuple(chosen[p] for p in parts)
  names = ['/'.join(p) for p in parts]
  digest = hashlib.sha256('\0'.join(classes).encode(*_UTF8))
  for name, file, label in zip(names, files, labels, strict=True):
    digest.update(f'\n{name}\0{sizes[file]}\0{label}'.encode(*_UTF8))
  return SplitFiles(files, labels, classes, digest.hexdigest())


def _strip_top(
  trees: Mapping[str, Parts], folders: set[Parts]
) -> tuple[dict[str, Parts], set[Parts]]:
  """Drops folders that hold everything, such as a tar's top folder."""
  depth = 0
  while True:
    tops = {parts[depth] for parts in trees.values()}
    if len(tops) > 1 or tops & set(SPLITS):
      break
    # A single picture at this depth: its name is no folder.
    if any(len(parts) == depth + 1 for parts in trees.values()):
      break
    depth += 1
  prefix = next(iter(trees.values()))[:depth]
  return (
    {file: parts[depth:] for file, parts in trees.items()},
    {f[depth:] for f in folders if f[:depth] == prefix and len(f) > depth},
  )


def _split_members(
  trees: Mapping[str, Parts], folders: set[Parts], path: str
) -> dict[str, dict[Parts, str]]:
  """Each split's pictures: path inside the split -> key of the listing."""
  members: dict[str, dict[Parts, str]] = {split: {} for split in SPLITS}
  if not _has_splits(trees, folders, path):
    for file, parts in trees.items():
      split = 'val' if in_validation('/'.join(parts)) else 'train'
      members[split][parts] = file
    return members
  for file, parts in trees.items():
    if parts[0] in SPLITS and len(parts) > 1:
      members[parts[0]][parts[1:]] = file
  if not members['val'] and ('val',) not in folders:
    # train/ alone: hold a tenth of it out.
    for parts in list(members['train']):
      if in_validation('/'.join(parts)):
        members['val'][parts] = members['train'].pop(parts)
  return members


def _has_splits(
  trees: Mapping[str, Parts], folders: set[Parts], path: str
) -> bool:
  """Tells splits train/ and val/ from classes: CIFAR-100 has `train`."""
  given = {parts[0] for parts in trees.values() if len(parts) > 1}
  there = given | {f[0] for f in folders if f}
  if given & set(SPLITS) and set(SPLITS) <= there:
    return True
  other = given & {'valid', 'validation', 'dev'}
  if 'train' in given and other:
    raise errors.DataError(
      f'{path} has {min(other)}/ beside train/; wanted train/ and val/: '
      f'rename {min(other)}/ to val/'
    )
  return bool(given & set(SPLITS)) and given <= {*SPLITS, 'test'}


def _class_names(members: list[Parts], path: str) -> tuple[str, ...]:
  """Sorted class folders over both splits; () where there are none."""
  loose = ['/'.join(parts) for parts in members if len(parts) == 1]
  if loose and len(loose) < len(members):
    raise errors.DataError(
      f'{path} has {len(loose)} images beside its class folders (such as '
      f'{min(loose)}); wanted all images in class folders or none: move them'
    )
  return () if loose else tuple(sorted({parts[0] for parts in members}))


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
    chosen: SplitFiles,
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
  """Lists a folder tree; DataError where `arrange` says so."""
  sizes, folders = _list_folder(path)
  chosen = arrange(sizes, folders, split, path)
  return PhotoSource(path, split, chosen, FolderReader(path, chosen.files))


def open_tar(path: str, split: str) -> PhotoSource:
  """Reads a tar's headers; DataError if it is damaged or has none."""
  stat = os.stat(path)
  spans, folders = _index_tar(path, stat.st_size, stat.st_mtime_ns)
  sizes = {name: size for name, (_, size) in spans.items()}
  chosen = arrange(sizes, folders, split, path)
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
      if is_image(file) and os.path.isfile(full):
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
  spans: dict[str, tuple[int, int]] = {}
  folders: set[str] = set()
  try:
    with tarfile.open(path, 'r:') as tar:
      while (member := tar.next()) is not None:
        # A million headers would take a gigabyte.
        tar.members.clear()  # type: ignore[attr-defined]
        name = pathlib.PurePosixPath(member.name).as_posix().lstrip('/')
        if member.isdir():
          folders.add(name)
        elif is_image(name) and member.islnk():
          target = pathlib.PurePosixPath(member.linkname).as_posix()
          if target in spans:
            spans[name] = spans[target]
        elif is_image(name) and member.isreg():
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
