"""Opens sources of pictures, in whatever form they are kept.

A source is random access, thread safe and picklable; `source[i]` is
{'image': uint8 [h, w, 3], 'label': int}.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from selfboottok_jax import errors, files, sizes
from selfboottok_jax.data import (
  joined,
  parquet,
  picture_set,
  pictures,
  records,
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
  if split not in picture_set.SPLITS:
    raise errors.ConfigError(
      f'unknown split {split!r}; wanted one of {", ".join(picture_set.SPLITS)}'
    )
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


# How the forms are told apart that are not the trees of files that remain.
_MATCHES = {
  'tfds': tfds.matches,
  'records': records.is_prepared,
  'shards': shards.matches,
  'parquet': parquet.matches,
}
SOURCES = ('auto', 'folder', 'tar', *_MATCHES)


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
