"""Photographs in an uncompressed tar, read in any order without unpacking it.

Where a tar, or a folder, holds tars in place of pictures, each is a folder by
its name without the ending, as the classes of ILSVRC2012_img_train.tar are.
"""

import functools
import io
import os
import tarfile
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int

from selfboottok_jax import errors
from selfboottok_jax.data import layout, picture_set, pictures

# Files by their first bytes, and what turns them into a plain tar.
_PACKED = {
  b'\x1f\x8b': ('gzip', 'gunzip'),
  b'BZh': ('bzip2', 'bunzip2'),
  b'\xfd7zXZ\x00': ('xz', 'unxz'),
  b'\x28\xb5\x2f\xfd': ('zstd', 'unzstd'),
  b'PK\x03\x04': ('zip', 'unzip'),
}
_BLOCK = tarfile.BLOCKSIZE
# Tars that are kept open; systems allow a process 1,024 files or fewer.
_OPEN = 256
# Links of links are followed so far, as systems do.
_HOPS = 40


def reader_maker(path: str) -> layout.ReaderMaker:
  """Returns what makes readers of a tar's files."""
  return lambda found: SpanReader(
    [path],
    np.zeros(len(found), np.int32),
    np.array([(f.offset, f.size) for f in found], np.int64).reshape(-1, 2),
  )


class SpanReader:
  """Reads spans of one or many tars.

  Reads are os.pread, which needs no shared position, so any number of threads
  may read; a pickled copy opens the tars again.
  """

  def __init__(
    self,
    paths: Sequence[str],
    tars: Int[np.ndarray, '_'],
    spans: Int[np.ndarray, 'n 2'],
  ):
    """Reads `spans`, (offset, bytes) each, of `paths[tars[index]]`."""
    self._paths, self._tars, self._spans = tuple(paths), tars, spans
    self._start()

  def __call__(self, index: int) -> bytes:
    """Returns the bytes of a span; DataError if the tar has changed."""
    tar = int(self._tars[index])
    offset, size = self._spans[index].tolist()
    path = self._paths[tar]
    try:
      data = self._read(tar, path, offset, size)
    except OSError as error:
      raise errors.DataError(
        f'cannot read {path}: {error.strerror}; it was there at the start: '
        'restore it, or start again without it'
      ) from error
    if len(data) < size:
      raise errors.DataError(
        f'{path} has become shorter since the start; restore it'
      )
    return data

  def _read(self, tar: int, path: str, offset: int, size: int) -> bytes:
    descriptor = self._open.get(tar)
    if descriptor is None and len(self._open) < _OPEN:
      with self._lock:
        if tar not in self._open:
          self._open[tar] = os.open(path, os.O_RDONLY)
        descriptor = self._open[tar]
    if descriptor is not None:
      return os.pread(descriptor, size, offset)
    # Closing another one, which a thread may be reading, would take a lock for
    # every read; opening a file costs far less than decoding a picture.
    descriptor = os.open(path, os.O_RDONLY)
    try:
      return os.pread(descriptor, size, offset)
    finally:
      os.close(descriptor)

  def _start(self) -> None:
    self._open: dict[int, int] = {}
    self._lock = threading.Lock()
    weakref.finalize(self, _close, self._open)

  def __getstate__(self) -> dict[str, Any]:
    """Leaves descriptors, which are this process's own, behind."""
    return {
      name: value
      for name, value in vars(self).items()
      if name not in ('_open', '_lock')
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Starts without open files."""
    vars(self).update(state)
    self._start()


def _close(descriptors: dict[int, int]) -> None:
  for descriptor in descriptors.values():
    os.close(descriptor)
  descriptors.clear()


def list_tar(path: str) -> layout.Listing:
  """Lists everything in a tar that is not hidden, links followed.

  Raises:
    DataError: no tar, or a damaged one.
  """
  with open(path, 'rb') as file:
    start = file.read(8)
  for magic, (kind, command) in _PACKED.items():
    if start.startswith(magic):
      raise errors.DataError(
        f'{path} is {kind}-compressed; wanted a plain .tar, whose images can '
        f'be read in any order: uncompress it first, with {command}'
      )
  stat = os.stat(path)
  return _list_tar(path, stat.st_size, stat.st_mtime_ns)


# Walking the headers of a large tar takes minutes; size and time tell whether
# it is the same one.
@functools.lru_cache(maxsize=2)
def _list_tar(path: str, size: int, changed: int) -> layout.Listing:
  del changed  # only part of the key
  try:
    with open(path, 'rb') as file:
      listing = _list_span(file, 0, size)
  except (tarfile.TarError, OSError, EOFError) as error:
    raise errors.DataError(
      f'{path} is no tar, or is cut short ({size} bytes, {error}); '
      'copy or download it again'
    ) from error
  if not has_end(path):
    listing.notes.append('the tar has no end mark, so it may be cut short')
  if listing.replaced:
    listing.notes.append(
      f'{len(listing.replaced):,} names come several times in the tar, such as '
      f'{listing.replaced[0]}; the last of each counts, as in unpacking it'
    )
  return listing


def _list_span(file: BinaryIO, start: int, end: int) -> layout.Listing:
  """Lists the tar that lies from `start` to `end` of a file."""
  root, listing = _Folder(), layout.Listing()
  _read_headers(file, start, end, root, listing.replaced)
  _list_folder(root, '', root, listing, (root,))
  if any(f.offset + f.size > end for f in listing.files.values()):
    raise tarfile.ReadError('a member goes beyond its end')

  def list_inner(name: str, inner: layout.File) -> layout.Listing:
    try:
      return _list_span(file, inner.offset, inner.offset + inner.size)
    except tarfile.TarError as error:
      raise tarfile.ReadError(f'{name} in it: {error}') from error

  open_inner(listing, list_inner)
  return listing


def open_inner(
  listing: layout.Listing,
  list_inner: Callable[[str, layout.File], layout.Listing],
) -> None:
  """Replaces tars in a listing by folders, where it has no pictures.

  A tar beside pictures is more likely the archive that they came from.

  Args:
    listing: changed in place.
    list_inner: lists a tar in it, by its name and its file.
  """
  if any(layout.suffix(n) in pictures.PICTURES for n in listing.files):
    return
  notes: dict[str, list[str]] = {}
  for name, file in list(listing.files.items()):
    if layout.suffix(name) != '.tar' or file.size < _BLOCK:
      continue
    inner = list_inner(name, file)
    del listing.files[name]
    top = name[: -len('.tar')]
    layout.add_folder(listing, top)
    for folder in inner.folders:
      layout.add_folder(listing, f'{top}/{folder}')
    listing.files |= {f'{top}/{n}': file for n, file in inner.files.items()}
    listing.bad += [
      picture_set.Bad(f'{top}/{bad.path}', bad.reason) for bad in inner.bad
    ]
    listing.replaced += [f'{top}/{n}' for n in inner.replaced]
    for note in inner.notes:
      notes.setdefault(note, []).append(name)
  for note, names in notes.items():
    others = f' (and {len(names) - 1:,} others)' if len(names) > 1 else ''
    listing.notes.append(f'{names[0]}{others}: {note}')


def has_end(path: str) -> bool:
  """True if a tar ends in zeros, as all do that were written to their end."""
  with open(path, 'rb') as file:
    file.seek(max(os.path.getsize(path) - _BLOCK, 0))
    return not any(file.read())


class _Folder(dict[str, Any]):
  """A folder of a tar: names -> _Folder, layout.File or _Link."""


class _Link(NamedTuple):
  """A symbolic link: its target from the tar's top, and as it is written."""

  target: str
  written: str


def _read_headers(
  file: BinaryIO, start: int, end: int, root: _Folder, replaced: list[str]
) -> None:
  """Enters the members of a tar into a tree.

  Args:
    file: holds the tar, perhaps inside another one.
    start: where it begins, in bytes.
    end: where it ends.
    root: where its members go.
    replaced: gets the names of members that a later one takes the place of.
  """
  position = start
  while position < end or position == start:
    window = _Window(file, position, end)
    with tarfile.open(fileobj=window, mode='r:') as tar:
      while (member := tar.next()) is not None:
        # A million headers would take a gigabyte.
        tar.members.clear()  # type: ignore[attr-defined]
        member.offset_data += position
        _enter(member, root, replaced)
      position += tar.offset
    # `cat a.tar b.tar` is the members of both, after the zeros that end the
    # first. `tarfile` takes a damaged header for an end too, and refuses to
    # begin with one.
    position = _skip_zeros(file, position, end)


def _enter(member: tarfile.TarInfo, root: _Folder, replaced: list[str]) -> None:
  """Enters a member into a tree."""
  parts = _parts(member.name)
  if not parts or any(map(layout.is_ignored, parts)):
    return
  if member.isdir():
    _make_folders(root, parts)
    return
  folder = _make_folders(root, parts[:-1])
  name = parts[-1]
  if member.islnk():
    # Of a file that came before; an absolute target is stripped as names are.
    target = _find(root, _parts(member.linkname), root)
    if isinstance(target, layout.File):
      folder[name] = target
    else:
      folder[name] = _Link(member.linkname, member.linkname)
  elif member.issym():
    target_path = member.linkname
    if not target_path.startswith('/'):
      target_path = os.path.normpath('/'.join((*parts[:-1], target_path)))
    folder[name] = _Link(target_path, member.linkname)
  elif member.issparse():
    raise tarfile.ReadError(
      f'{member.name} is stored without its holes, which pictures do not have; '
      'pack it without --sparse'
    )
  elif member.isreg():
    if isinstance(folder.get(name), layout.File):
      replaced.append('/'.join(parts))
    offset = member.offset_data
    folder[name] = layout.File(member.size, offset, offset)


def _parts(name: str) -> tuple[str, ...]:
  """A member's path without a root, '.' or '..', as tars are unpacked."""
  parts = name.split('/')
  if '..' in parts:
    parts = os.path.normpath(name.lstrip('/')).split('/')
  return tuple(part for part in parts if part not in ('', '..', '.'))


def _make_folders(folder: _Folder, parts: Sequence[str]) -> _Folder:
  """The folder below another; what is not there is made."""
  for part in parts:
    below = folder.get(part)
    if not isinstance(below, _Folder):
      below = folder[part] = _Folder()
    folder = below
  return folder


def _find(
  folder: _Folder, parts: Sequence[str], root: _Folder, hops: int = _HOPS
) -> Any:
  """What a path leads to: a _Folder, a File, or None for nothing."""
  found: Any = folder
  for part in parts:
    if not isinstance(found, _Folder):
      return None
    found = found.get(part)
    if isinstance(found, _Link):
      if not hops:
        return None
      found = _find(root, _parts(found.target), root, hops - 1)
  return found


def _list_folder(
  folder: _Folder,
  relative: str,
  root: _Folder,
  listing: layout.Listing,
  branch: tuple[_Folder, ...],
) -> None:
  """Lists a folder as `folders.list_folder` lists one of a disk."""
  for name, entry in sorted(folder.items()):
    if layout.is_ignored(name):
      continue
    path, found = f'{relative}{name}', entry
    if isinstance(entry, _Link):
      found = _find(root, _parts(entry.target), root)
    if isinstance(found, layout.File):
      listing.files[path] = found
    elif isinstance(found, _Folder):
      if not any(found is above for above in branch):
        layout.add_folder(listing, path)
        _list_folder(found, f'{path}/', root, listing, (*branch, found))
    else:
      reason = f'it is a link to {entry.written}, which is not there'
      listing.bad.append(picture_set.Bad(path, reason))


def _skip_zeros(file: BinaryIO, position: int, end: int) -> int:
  """The first block from `position` on that is not all zeros."""
  while position < end:
    data = os.pread(file.fileno(), min(2**20, end - position), position)
    if not data:
      return end
    kept = len(data) - len(data.lstrip(b'\0'))
    if kept < len(data):
      return position + kept // _BLOCK * _BLOCK
    position += len(data)
  return end


class _Window(io.RawIOBase):
  """Bytes `start` to `end` of a file, as a file."""

  def __init__(self, file: BinaryIO, start: int, end: int):
    super().__init__()
    self._file, self._start, self._end = file, start, end
    self._position = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {
      os.SEEK_SET: 0,
      os.SEEK_CUR: self._position,
      os.SEEK_END: self._end - self._start,
    }[whence]
    self._position = base + offset
    return self._position

  def tell(self) -> int:
    return self._position

  def read(self, size: int | None = -1) -> bytes:
    left = max(self._end - self._start - self._position, 0)
    size = left if size is None or size < 0 else min(size, left)
    data = os.pread(self._file.fileno(), size, self._start + self._position)
    self._position += len(data)
    return data
