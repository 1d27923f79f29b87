"""Opens sources of pictures, in whatever form they are kept.

A source is random access, thread safe and picklable; `source[i]` is
{'image': uint8 [h, w, 3], 'label': int}.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from selfboottok_jax import errors, files, sizes
from selfboottok_jax.data import (
  joined,
  layout,
  parquet,
  picture_set,
  pictures,
  records,
  roles,
  scenes,
  shards,
  tfds,
)

BUILT_IN = 'procedural'
BAD = ('stop', 'skip')


@runtime_checkable
class Source(Protocol):
  """Pictures by index, or what a cache kept of them.

  Attributes:
    class_names: empty when there are no classes; every label is then 0.
    fingerprint: sha256 (hex) of what determines the content.
    max_scale: how far training enlarges pictures before it crops.
  """

  class_names: tuple[str, ...]
  max_scale: float

  @property
  def fingerprint(self) -> str:
    """See the class."""

  def __len__(self) -> int:
    """Number of pictures."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one: {'image': uint8 [h, w, 3], 'label': int}.

    A `token_cache.TokenCache` has its fields in place of 'image'.
    """


def open_source(
  source: str,
  path: str | os.PathLike[str],
  split: str,
  image_size: sizes.Size,
  *,
  options: pictures.Options | None = None,
  bad: str = 'stop',
) -> Source:
  """Opens a split of photographs, or the built-in scenes.

  Args:
    source: 'auto' (by `path`), one of SOURCES, or 'procedural'.
    path: where the photographs are; '' for 'procedural'.
    split: 'train' or 'val'.
    image_size: pixels a side, or (height, width), at which built-in scenes
      are drawn; photographs keep their own size.
    options: how photographs are decoded.
    bad: 'stop' refuses a set with pictures that the listing shows to be
      unreadable; 'skip' leaves them out.

  Raises:
    ConfigError: an unknown source or split, or 'procedural' with a path.
    DataError: a path that is missing or empty, or holds no such images.
  """
  path = os.fspath(path)
  _check_split(split)
  if source == BUILT_IN:
    if path:
      raise errors.ConfigError(
        f'the built-in scenes read no files, but the path {path} was given; '
        f"leave it empty, or set the source to 'auto' to train on {path}"
      )
    return scenes.ProceduralSource(split, image_size)
  found = open_pictures(path, source=source)
  if found.bad and bad == 'stop':
    first = found.bad[0]
    raise errors.DataError(
      f'{len(found.bad):,} images of {path} cannot be read, such as '
      f'{first.path}: {first.reason}; take them out, or set data.bad=skip'
    )
  return picture_set.PictureSource(found, split, options)


def open_pictures(
  path: str | os.PathLike[str],
  *,
  source: str = 'auto',
  label_files: Sequence[str] = (),
  any_size: bool = False,
) -> picture_set.PictureSet:
  """Lists both splits of photographs.

  Args:
    path: a folder or a tar of pictures; two of them, with a comma between, of
      which one has 'train' and one 'val' in its name; or what `shards`,
      `parquet`, `tfds` and `records` open.
    source: see `open_source`; not 'procedural'.
    label_files: see `labels.label_pictures`.
    any_size: opens sets too that are fast only where pictures are read in
      order, see `parquet.open_parquet`.

  Raises:
    ConfigError: an unknown source.
    DataError: a path that is missing or empty, or holds no images.
  """
  path = os.fspath(path)
  if source not in SOURCES:
    raise errors.ConfigError(
      f'unknown data source {source!r}; wanted one of '
      f'{", ".join((*SOURCES, BUILT_IN))}'
    )
  if not path:
    raise errors.DataError(
      'the path of the photographs is empty; give a folder of images or a '
      f'.tar of one, or set the source to {BUILT_IN!r} for built-in scenes'
    )
  if source == 'auto':
    source = next(
      (name for name, matches in _MATCHES.items() if matches(path)), 'auto'
    )
  if label_files and source in _MATCHES:
    raise errors.ConfigError(
      f'--labels={",".join(label_files)} with {path}, which has labels of its '
      'own; leave it out'
    )
  if source == 'tfds':
    return tfds.open_tfds(path)
  if source == 'shards':
    return shards.open_shards(path)
  if source == 'parquet':
    return parquet.open_parquet(path, any_size=any_size)
  if source == 'records':
    return records.open_records(path)
  paths = [path]
  if ',' in path and not os.path.exists(os.path.expanduser(path)):
    paths = [part for part in path.split(',') if part]
  paths = [os.fspath(files.as_path(part)) for part in paths]
  for each in paths:
    if not _is_remote(each) and not os.path.exists(each):
      raise errors.DataError(
        f'{each} does not exist; give a folder of images or a .tar of one'
      )
    _check_kind(source, each)
  return joined.open_trees(paths, label_files)


def open_all(
  path: str | os.PathLike[str], *, split: str = 'val', flag: str = 'path'
) -> picture_set.PictureSource:
  """Opens all pictures of a path, as one set without classes.

  Of a set with `train` and `val` they are those of one split; of anything else
  that is a folder or a tar, every picture below it, in the order of the names.

  Args:
    path: what `open_pictures` takes.
    split: the split, where there are splits.
    flag: the flag that gave the path, for errors.

  Raises:
    ConfigError: an unknown split.
    DataError: a path that is missing, holds no images, or holds some that
      cannot be read.
  """
  path = os.fspath(path)
  _check_split(split)
  if any(matches(path) for matches in _MATCHES.values()):
    return picture_set.PictureSource(open_pictures(path), split)
  path = os.fspath(files.as_path(path))
  if not _is_remote(path) and not os.path.exists(path):
    raise errors.DataError(f'--{flag}={path} does not exist; give {_ANY_FORM}')
  _check_kind('auto', path)
  listing, maker = joined.list_tree(path)
  names = [
    name for name in listing.files if layout.suffix(name) in pictures.suffixes()
  ]
  top = layout.common_top(listing)
  folders = {name.removeprefix(top).split('/')[0] for name in names}
  by_role = {roles.folder_role(folder): folder for folder in folders}
  if {'train', 'val'} <= by_role.keys():
    top = f'{top}{by_role[split]}/'
  names = sorted(name for name in names if name.startswith(top))
  if not names:
    raise errors.DataError(f'--{flag}={path} holds no images; give {_ANY_FORM}')
  empty = [name for name in names if not listing.files[name].size]
  if empty or listing.bad:
    first = empty[0] if empty else listing.bad[0].path
    raise errors.DataError(
      f'--{flag}={path} holds images that cannot be read, such as {first}; '
      'take them out'
    )
  short = [name.removeprefix(top) for name in names]
  lengths = np.array([listing.files[name].size for name in names], np.int64)
  labels = np.zeros(len(names), np.int32)
  found = picture_set.Split(
    short,
    lengths,
    labels,
    maker([listing.files[name] for name in names]),
    picture_set.digest((), short, lengths, labels),
    prefix=top,
  )
  both = dict.fromkeys(picture_set.SPLITS, found)
  return picture_set.PictureSource(
    picture_set.PictureSet(path, both, (), 'all images'), split
  )


_ANY_FORM = 'a folder or a .tar of images'

# How the forms are told apart that are not the trees of files that remain.
_MATCHES = {
  'tfds': tfds.matches,
  'records': records.is_prepared,
  'shards': shards.matches,
  'parquet': parquet.matches,
}
SOURCES = ('auto', 'folder', 'tar', *_MATCHES)


def _check_split(split: str) -> None:
  if split not in picture_set.SPLITS:
    raise errors.ConfigError(
      f'unknown split {split!r}; wanted one of {", ".join(picture_set.SPLITS)}'
    )


def _is_remote(path: str) -> bool:
  return files.is_remote(files.as_path(path))


def _check_kind(source: str, path: str) -> None:
  """Raises DataError for a path that is no source of the kind."""
  remote = _is_remote(path)
  if remote and path.lower().endswith(('.tar', '.parquet')):
    raise errors.DataError(
      f'{path} cannot be read in any order where it is; copy it to a local '
      'disk, or give a folder of images there'
    )
  is_folder = remote or os.path.isdir(path)
  if source == 'folder' and not is_folder:
    raise errors.DataError(f'{path} is no folder; give a folder of images')
  if source == 'tar' and is_folder:
    raise errors.DataError(f'{path} is no file; give a .tar of images')
  # Compressed tars go on, for the advice that they get.
  lower = path.lower()
  is_tar = '.tar' in pathlib.Path(lower).suffixes or lower.endswith(
    ('.tgz', '.tbz2', '.txz', '.zip')
  )
  if source == 'auto' and not is_folder and not is_tar:
    raise errors.DataError(
      f'{path} is neither a folder nor a .tar; give a folder of images or a '
      '.tar of one'
    )


def is_same(source: Source, fingerprint: str) -> bool:
  """True if a fingerprint, perhaps of an earlier version, is a source's."""
  former = getattr(source, 'former_fingerprint', '')
  return fingerprint in (source.fingerprint, former)


def describe(source: Source) -> str:
  """One line on a source for logs."""
  classes = len(source.class_names)
  kinds = f'{classes} classes' if classes else 'no classes'
  return (
    f'{source!r}: {len(source):,} images, {kinds}, '
    f'fingerprint {source.fingerprint[:12]}'
  )
