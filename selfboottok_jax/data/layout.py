"""Which pictures of a tree belong to a split, and what their labels are.

Pure functions of relative paths, so that a folder and a tar of the same tree
give the same order, labels and split.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping

from selfboottok_jax import errors

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
class Layout:
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
  """Whether a relative path is taken for a picture; hidden ones are not."""
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
) -> Layout:
  """Picks a split's pictures out of a listing.

  Args:
    sizes: bytes of every picture, by path relative to the tree, with '/'.
    folders: relative paths of all folders, with or without pictures: an empty
      val/ is an error where an absent one means a split by hash.
    split: 'train' or 'val'.
    path: the tree as the user named it, for errors.

  Returns:
    The layout. Folders that hold everything are passed over, so a single class
    is none; beside `train/` and `val/` nothing else counts.

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
  return Layout(files, labels, classes, digest.hexdigest())


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
  members = {split: {} for split in SPLITS}
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
  """Whether train/ and val/ are splits; CIFAR-100 has a class of trains."""
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
