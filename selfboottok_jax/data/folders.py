"""Photographs as files in a folder, on a disk or in a bucket."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from selfboottok_jax import errors, files
from selfboottok_jax.data import layout, picture_set, tars


def reader_maker(path: str) -> layout.ReaderMaker:
  """Returns what makes readers of a folder's files, or of those in its tars."""

  def make(found: Sequence[layout.File]) -> picture_set.Reader:
    inside = [file for file in found if isinstance(file.address, tuple)]
    if inside:
      # There are tars only where no pictures are beside them.
      assert len(inside) == len(found)
      return _tar_reader(path, inside)
    return FolderReader(path, [str(file.address) for file in found])

  return make


def _tar_reader(path: str, found: Sequence[layout.File]) -> tars.SpanReader:
  """Reads files of tars below a folder."""
  numbers: dict[str, int] = {}
  # The tars are numbered as they come.
  of_file = [numbers.setdefault(f.tar, len(numbers)) for f in found]
  return tars.SpanReader(
    [os.path.join(path, name) for name in numbers],
    np.array(of_file, np.int32),
    np.array([(f.offset, f.size) for f in found], np.int64),
  )


class FolderReader:
  """Reads files below a folder, one a picture."""

  def __init__(self, path: str, names: Sequence[str]):
    """Reads files that are given relative to `path`."""
    self._folder, self._names = files.as_path(path), names
    self._is_remote = files.is_remote(self._folder)

  def __call__(self, index: int) -> bytes:
    """Returns the bytes of a file; DataError if it has gone since."""
    file = f'{self._folder}/{self._names[index]}'
    try:
      if self._is_remote:
        remote = files.as_path(file)
        with files.reaching(remote):
          return remote.read_bytes()
      # A path object and a buffer would take a tenth of a small picture's time.
      with open(file, 'rb', buffering=0) as opened:
        return opened.read()
    except OSError as error:
      raise errors.DataError(
        f'cannot read {file}: {error.strerror or error}; it was there at the '
        'start: restore it, or start again without it'
      ) from error


def list_folder(path: str) -> layout.Listing:
  """Lists everything below a folder that is not hidden.

  Tars on a disk are folders where there are no pictures beside them, see
  `tars.open_inner`.
  """
  listing = layout.Listing()
  root = files.as_path(path)
  if files.is_remote(root):
    with files.reaching(root):
      _list_remote(root, '', listing)
  else:
    # By device and inode, for which no link is resolved twice.
    stat = os.stat(path)
    _list_local(path, '', listing, {(stat.st_dev, stat.st_ino)})
    tars.open_inner(listing, lambda name, file: _list_tar(path, name, file))
  return listing


def _list_tar(path: str, name: str, tar: layout.File) -> layout.Listing:
  """Lists a tar below a folder; addresses are relative to the folder."""
  inside = tars.list_tar(os.path.join(path, name))
  found = {
    inner: layout.File(
      file.size, (name, file.offset), (tar.identity, file.identity)
    )
    for inner, file in inside.files.items()
  }
  return dataclasses.replace(inside, files=found)


def _list_local(
  folder: str,
  relative: str,
  listing: layout.Listing,
  branch: set[tuple[int, int]],
) -> None:
  """Lists a folder below the folders in `branch`.

  A link may lead to a folder that is listed elsewhere too, as val -> train. One
  that leads back to a folder of its own branch would never end.
  """
  try:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
  except OSError as error:
    raise errors.DataError(
      f'cannot list {error.filename}: {error.strerror}; make it readable, or '
      'take it out'
    ) from error
  for entry in entries:
    if layout.is_ignored(entry.name):
      continue
    name = f'{relative}{entry.name}'
    try:
      stat = entry.stat()
    except OSError as error:
      reason = error.strerror or str(error)
      if entry.is_symlink():
        reason = (
          f'it is a link to {os.readlink(entry.path)}, which is not there'
        )
      listing.bad.append(picture_set.Bad(name, reason))
      continue
    inode = (stat.st_dev, stat.st_ino)
    if entry.is_dir():
      if inode not in branch:
        layout.add_folder(listing, name)
        _list_local(entry.path, f'{name}/', listing, branch | {inode})
    elif entry.is_file():
      listing.files[name] = layout.File(stat.st_size, name, inode)
    else:
      listing.bad.append(picture_set.Bad(name, 'it is no regular file'))


def _list_remote(
  folder: files.Path, relative: str, listing: layout.Listing
) -> None:
  """Lists a folder of a bucket, where there are no links."""
  for entry in sorted(files.children(folder), key=lambda entry: entry.name):
    if layout.is_ignored(entry.name):
      continue
    assert isinstance(entry, epath.Path)
    name = f'{relative}{entry.name}'
    if entry.is_dir():
      listing.folders.add(name)
      _list_remote(entry, f'{name}/', listing)
    else:
      listing.files[name] = layout.File(entry.stat().length, name)
