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
  return lambda found: FolderReader(path, found)


class FolderReader:
  """Reads files below a folder, or of tars below it, one a picture."""

  def __init__(self, path: str, found: Sequence[layout.File]):
    """Reads files whose addresses are relative to `path`."""
    self._folder = files.as_path(path)
    self._is_remote = files.is_remote(self._folder)
    addresses = [
      f.address if isinstance(f.address, tuple) else (str(f.address), -1)
      for f in found
    ]
    self._names = [name for name, _ in addresses]
    # Where it begins in its tar, -1 for a file of its own; and its bytes.
    self._spans = np.array(
      [(start, f.size) for (_, start), f in zip(addresses, found, strict=True)],
      np.int64,
    ).reshape(-1, 2)

  def __call__(self, index: int) -> bytes:
    """Returns the bytes of a picture; DataError if it has gone since."""
    file = f'{self._folder}/{self._names[index]}'
    start, size = self._spans[index].tolist()
    try:
      if self._is_remote:
        remote = files.as_path(file)
        with files.reaching(remote):
          return remote.read_bytes()
      # A path object and a buffer would take a tenth of a small picture's time.
      with open(file, 'rb', buffering=0) as opened:
        if start < 0:
          return opened.read()
        data = os.pread(opened.fileno(), size, start)
    except OSError as error:
      raise errors.DataError(
        f'cannot read {file}: {error.strerror or error}; it was there at the '
        'start: restore it, or start again without it'
      ) from error
    if len(data) < size:
      raise errors.DataError(
        f'{file} has become shorter since the start; restore it'
      )
    return data


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
        layout.count_folder(listing, name)
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
