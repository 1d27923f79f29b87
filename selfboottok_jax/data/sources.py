"""Opens sources of pictures: a folder, a tar, or the built-in scenes.

A source is random access, thread safe and picklable; `source[i]` is
{'image': uint8 [h, w, 3], 'label': int}.
"""

import os
import pathlib
from typing import Any, Protocol, runtime_checkable

from selfboottok_jax import errors, sizes
from selfboottok_jax.data import photos, scenes

# Files by their first bytes, and what turns them into a plain tar.
_PACKED = {
  b'\x1f\x8b': ('gzip', 'gunzip'),
  b'BZh': ('bzip2', 'bunzip2'),
  b'\xfd7zXZ\x00': ('xz', 'unxz'),
  b'\x28\xb5\x2f\xfd': ('zstd', 'unzstd'),
  b'PK\x03\x04': ('zip', 'unzip'),
}


@runtime_checkable
class Source(Protocol):
  """Pictures by index, or what a cache kept of them.

  Attributes:
    class_names: empty when there are no classes; every label is then 0.
    fingerprint: sha256 (hex) of what determines the content.
    max_scale: how far training enlarges pictures before it crops.
  """

  class_names: tuple[str, ...]
  fingerprint: str
  max_scale: float

  def __len__(self) -> int:
    """Number of pictures."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one: {'image': uint8 [h, w, 3], 'label': int}.

    A `token_cache.TokenCache` has its fields in place of 'image'.
    """


def open_folder(path: str, split: str) -> Source:
  """Opens a folder of class folders, or of pictures."""
  if not os.path.isdir(path):
    raise errors.DataError(f'{path} is no folder; give a folder of images')
  return photos.open_folder(path, split)


def open_tar(path: str, split: str) -> Source:
  """Opens an uncompressed tar of such a folder."""
  if not os.path.isfile(path):
    raise errors.DataError(f'{path} is no file; give a .tar of images')
  with open(path, 'rb') as file:
    start = file.read(8)
  for magic, (kind, command) in _PACKED.items():
    if start.startswith(magic):
      raise errors.DataError(
        f'{path} is {kind}-compressed; wanted a plain .tar, whose images can '
        f'be read in any order: uncompress it first, with {command}'
      )
  return photos.open_tar(path, split)


def _open_auto(path: str, split: str) -> Source:
  if os.path.isdir(path):
    return open_folder(path, split)
  # Compressed tars go on to open_tar for its advice.
  if '.tar' in pathlib.Path(path).suffixes or path.endswith(
    ('.tgz', '.tbz2', '.txz', '.zip')
  ):
    return open_tar(path, split)
  raise errors.DataError(
    f'{path} is neither a folder nor a .tar; give a folder of images or a '
    '.tar of one'
  )


SOURCES = {'auto': _open_auto, 'folder': open_folder, 'tar': open_tar}
BUILT_IN = 'procedural'


def open_source(
  source: str, path: str, split: str, image_size: sizes.Size
) -> Source:
  """Opens a split of photographs, or the built-in scenes.

  Args:
    source: 'auto' (by `path`), 'folder', 'tar' or 'procedural'.
    path: where the photographs are; '' for 'procedural'.
    split: 'train' or 'val'.
    image_size: pixels a side, or (height, width), at which built-in scenes
      are drawn; photographs keep their own size.

  Raises:
    ConfigError: an unknown source or split, or 'procedural' with a path.
    DataError: a path that is missing or empty, or holds no such images.
  """
  if source not in (*SOURCES, BUILT_IN):
    raise errors.ConfigError(
      f'unknown data source {source!r}; wanted one of '
      f'{", ".join((*SOURCES, BUILT_IN))}'
    )
  if split not in photos.SPLITS:
    raise errors.ConfigError(
      f'unknown split {split!r}; wanted one of {", ".join(photos.SPLITS)}'
    )
  if source == BUILT_IN:
    if path:
      raise errors.ConfigError(
        f'the built-in scenes read no files, but the path {path} was given; '
        f"leave it empty, or set the source to 'auto' to train on {path}"
      )
    return scenes.ProceduralSource(split, image_size)
  if not path:
    raise errors.DataError(
      'the path of the photographs is empty; give a folder of images or a '
      f'.tar of one, or set the source to {BUILT_IN!r} for built-in scenes'
    )
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise errors.DataError(
      f'{path} does not exist; give a folder of images or a .tar of one'
    )
  return SOURCES[source](path, split)


def describe(source: Source) -> str:
  """One line on a source for logs."""
  classes = len(source.class_names)
  kinds = f'{classes} classes' if classes else 'no classes'
  return (
    f'{source!r}: {len(source):,} images, {kinds}, '
    f'fingerprint {source.fingerprint[:12]}'
  )
