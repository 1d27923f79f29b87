"""Folders and tars of pictures, one alone or a split each."""

import os
from collections.abc import Sequence

import numpy as np

from selfboottok_jax import errors, files
from selfboottok_jax.data import (
  folders,
  labels,
  layout,
  picture_set,
  pictures,
  roles,
  tars,
)


def open_trees(
  paths: Sequence[str], label_files: Sequence[str] = ()
) -> picture_set.PictureSet:
  """Opens a folder or tar with both splits, or one of each split.

  Args:
    paths: a single one; or two with 'train' and 'val' in their names, as
      ILSVRC2012_img_train.tar.
    label_files: classes of the val pictures, where those lie in one folder; see
      `labels.label_pictures`.

  Raises:
    DataError: a name that tells no split, or pictures that do not fit.
  """
  whole = layout.Listing()
  makers: list[layout.ReaderMaker] = []
  splits: list[str] = []
  for part, path in enumerate(paths):
    listing, maker = list_tree(path)
    makers.append(maker)
    prefix = top = ''
    if len(paths) > 1:
      # A tar of the folder `val` holds `val/...`.
      top = layout.common_top(listing)
      splits.append(_split_of(path, paths))
      prefix = f'{splits[-1]}/'
      whole.folders.add(splits[-1])
    whole.folders |= {
      prefix + name.removeprefix(top)
      for name in listing.folders
      if name.startswith(top)
    }
    whole.notes += listing.notes
    whole.bad += [
      picture_set.Bad(prefix + bad.path.removeprefix(top), bad.reason)
      for bad in listing.bad
    ]
    for name, file in listing.files.items():
      # Equal offsets in two tars are not the same data.
      same = None if file.identity is None else (path, file.identity)
      new = prefix + name.removeprefix(top)
      whole.files[new] = file._replace(identity=same, part=part)
    if len(paths) > 1 and not any(
      layout.suffix(name) in pictures.PICTURES for name in listing.files
    ):
      raise errors.DataError(
        f'{path} holds no images, of which it should be one split; check it'
      )
  if len(set(splits)) < len(splits):
    raise errors.DataError(
      f'{",".join(paths)} are of {", ".join(splits)}; wanted one path for '
      'train and one for val'
    )
  if label_files:
    whole = labels.label_pictures(whole, label_files)
  return layout.arrange(
    whole,
    ','.join(paths),
    makers[0] if len(makers) == 1 else lambda f: _JoinedReader(f, makers),
  )


def list_tree(path: str) -> tuple[layout.Listing, layout.ReaderMaker]:
  """Lists a folder or a tar; returns what makes its readers too."""
  if files.is_remote(files.as_path(path)) or os.path.isdir(path):
    return folders.list_folder(path), folders.reader_maker(path)
  return tars.list_tar(path), tars.reader_maker(path)


def _split_of(path: str, paths: Sequence[str]) -> str:
  """The split that a path's name tells."""
  base = os.path.basename(path.rstrip('/'))
  found = roles.word_role(base)
  if found not in picture_set.SPLITS:
    raise errors.DataError(
      f'{",".join(paths)}: the name {base} does not tell train from val; '
      'wanted one path with train in its name and one with val'
    )
  return found


class _JoinedReader:
  """Reads files of several folders or tars."""

  def __init__(
    self, found: Sequence[layout.File], makers: Sequence[layout.ReaderMaker]
  ):
    self._part = np.array([file.part for file in found], np.int16)
    self._index = np.zeros(len(found), np.int64)
    self._readers = []
    for part, maker in enumerate(makers):
      mine = np.flatnonzero(self._part == part)
      self._index[mine] = np.arange(len(mine))
      self._readers.append(maker([found[i] for i in mine.tolist()]))

  def __call__(self, index: int) -> bytes:
    return self._readers[self._part[index]](int(self._index[index]))
