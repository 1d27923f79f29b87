"""Finds splits and classes in a tree of pictures.

They depend on relative paths alone, so that a folder and a tar of the same tree
give the same order, labels and split.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from selfboottok_jax import errors
from selfboottok_jax.data import classes as classes_lib
from selfboottok_jax.data import (
  packed_names,
  picture_set,
  pictures,
  roles,
  synsets,
)

Parts = tuple[str, ...]

# What systems leave in folders, beside names that begin with a dot.
_SYSTEM_NAMES = frozenset({
  '#recycle', '$recycle.bin', '@eadir', '@recycle', '@tmp', '__macosx',
  '__pycache__', 'desktop.ini', 'lost+found', 'system volume information',
  'thumbs.db',
})  # fmt: skip


def is_ignored(name: str) -> bool:
  """True for the name of a file or folder that is hidden or a system's own."""
  return name.startswith('.') or name.lower() in _SYSTEM_NAMES


def suffix(path: str) -> str:
  """The ending of a file's name in lower case, as '.jpg'."""
  return pathlib.PurePosixPath(path).suffix.lower()


class File(NamedTuple):
  """A file of a tree.

  Attributes:
    size: bytes.
    address: where its data are: the path below a folder, the offset in a tar,
      or the path of a tar below a folder and the offset in it.
    identity: equal for two files that are the same data; None if unknown.
    part: which of several folders or tars has it.
  """

  size: int
  address: str | int | tuple[str, int]
  identity: Hashable = None
  part: int = 0

  @property
  def offset(self) -> int:
    """Position of a tar member's data in its tar, in bytes."""
    last = self.address[1] if isinstance(self.address, tuple) else self.address
    assert isinstance(last, int)
    return last

  @property
  def tar(self) -> str:
    """Path of the tar, for a member of a tar below a folder."""
    assert isinstance(self.address, tuple)
    return self.address[0]


# Folders that lead to each other by links have a path for each of their orders.
MOST_FOLDERS = 1_000_000


# Makes the reader of some files.
ReaderMaker = Callable[[Sequence[File]], picture_set.Reader]


@dataclasses.dataclass
class Listing:
  """Everything that a folder or a tar holds, but for what is ignored.

  Attributes:
    files: by path relative to the tree, with '/'.
    folders: relative paths of all folders, with or without files.
    bad: files that are there by name only, as a link that leads nowhere.
    notes: what a user should know, a sentence each.
    replaced: names that a tar has several times, once for each earlier one.
  """

  files: dict[str, File] = dataclasses.field(default_factory=dict)
  folders: set[str] = dataclasses.field(default_factory=set)
  bad: list[picture_set.Bad] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  replaced: list[str] = dataclasses.field(default_factory=list)


def add_folder(listing: Listing, name: str) -> None:
  """Adds a folder; DataError if there are more than real trees have."""
  listing.folders.add(name)
  if len(listing.folders) > MOST_FOLDERS:
    raise errors.DataError(
      f'more than {MOST_FOLDERS:,} folders, such as {name}: links lead from '
      'folder to folder in too many ways; take some out'
    )


def arrange(
  listing: Listing, path: str, reader: ReaderMaker
) -> picture_set.PictureSet:
  """Finds splits, classes and their pictures in a listing.

  Folders that hold everything are passed over. `train/` and `val/`, by these or
  similar names, are splits, beside which nothing else counts; otherwise one
  picture in ten is held out. Folders below are classes, sorted by name, or by
  number where all are numbers. A class folder without files keeps its label.

  Args:
    listing: what the tree holds.
    path: the tree as the user named it, for errors.
    reader: makes the function that reads the pictures of a split.

  Raises:
    DataError: no pictures at all, pictures beside class folders, or folders
      that could be splits as well as classes.
  """
  known = pictures.suffixes()
  # Links of other files lead nowhere without harm.
  bad = [item for item in listing.bad if suffix(item.path) in pictures.PICTURES]
  shown: dict[str, File] = {}
  other: list[str] = []
  for name, file in listing.files.items():
    if suffix(name) not in known:
      other.append(name)
    elif not file.size:
      bad.append(picture_set.Bad(name, 'the file is empty'))
    else:
      shown[name] = file
  skipped = collections.Counter(suffix(name) or 'no suffix' for name in other)
  if not shown:
    raise errors.DataError(_nothing(path, skipped, bad, known))
  # A class whose pictures are all bad is one, and keeps its label.
  damaged = [item.path for item in bad if suffix(item.path) in known]
  tree = _Tree(
    {name: pathlib.PurePosixPath(name).parts for name in (*shown, *damaged)},
    {pathlib.PurePosixPath(name).parts for name in listing.folders},
    {pathlib.PurePosixPath(name).parts for name in other},
  )
  notes = list(listing.notes)
  tree, single = _strip_top(tree)
  members, inner, origin = _split_members(tree, path, notes)
  classes = _class_names(members, inner, path, single, notes)
  splits = {}
  for split in picture_set.SPLITS:
    splits[split] = _make_split(
      members[split], shown, classes, bool(single), reader
    )
  _note_shared(members, shown, notes)
  notes += [
    f'there are no {split} images, which every training needs'
    for split, part in splits.items()
    if not len(part)
  ]
  return picture_set.PictureSet(
    path,
    splits,
    classes,
    origin,
    tuple(notes),
    dict(skipped),
    tuple(sorted(bad, key=lambda item: item.path)),
  )


@dataclasses.dataclass(frozen=True)
class _Tree:
  """Paths as parts: pictures by key, all folders, and what is no picture."""

  files: Mapping[str, Parts]
  folders: set[Parts]
  other: set[Parts]

  def below(self, prefix: Parts) -> '_Tree':
    """Returns the part of the tree below a folder."""
    n = len(prefix)
    return _Tree(
      {k: p[n:] for k, p in self.files.items() if p[:n] == prefix},
      {p[n:] for p in self.folders if p[:n] == prefix and len(p) > n},
      {p[n:] for p in self.other if p[:n] == prefix and len(p) > n},
    )


def _nothing(
  path: str,
  skipped: Mapping[str, int],
  bad: Sequence[picture_set.Bad],
  known: Iterable[str],
) -> str:
  """The message for a tree without a picture."""
  there = [f'{n:,} {kind}' for kind, n in sorted(skipped.items())]
  if bad:
    there.append(f'{bad[0].path}: {bad[0].reason}')
  hint = ''
  if {'.heic', '.heif'} & set(skipped):
    hint = ', or install pillow-heif'
  elif '.tar' in skipped:
    hint = ', or copy it to a local disk, where tars in folders are read'
  found = f' (it has {", ".join(there[:8])})' if there else ''
  return (
    f'{path} holds no images{found}; wanted files that end in '
    f'{" ".join(sorted(known))}: check the path{hint}'
  )


def _strip_top(tree: _Tree) -> tuple[_Tree, str]:
  """Drops folders that hold everything, such as a tar's top folder.

  Returns:
    The tree, and the last folder that was dropped if nothing but pictures was
    in it: the name of their only class.
  """
  depth = 0
  while True:
    tops = {parts[depth] for parts in tree.files.values()}
    if len(tops) > 1 or any(roles.folder_role(top) for top in tops):
      break
    # A single picture at this depth: its name is no folder.
    if any(len(parts) == depth + 1 for parts in tree.files.values()):
      break
    # A class whose siblings are empty has siblings all the same.
    prefix = next(iter(tree.files.values()))[:depth]
    holds_pictures = any(len(p) == depth + 2 for p in tree.files.values())
    if holds_pictures and len(_empty_folders(tree.below(prefix))) > 0:
      break
    depth += 1
  prefix = next(iter(tree.files.values()))[:depth]
  stripped = tree.below(prefix)
  flat = all(len(parts) == 1 for parts in stripped.files.values())
  return stripped, prefix[-1] if flat and prefix else ''


def _empty_folders(tree: _Tree) -> set[str]:
  """Top folders without any file below them."""
  full = {parts[0] for parts in tree.files.values() if len(parts) > 1}
  full |= {parts[0] for parts in tree.other if len(parts) > 1}
  return {parts[0] for parts in tree.folders} - full


def common_top(listing: Listing) -> str:
  """Returns the folder that holds all pictures, as 'photos/val/', or ''."""
  tops: tuple[str, ...] | None = None
  for name in listing.files:
    if suffix(name) in pictures.PICTURES:
      parts = tuple(name.split('/')[:-1])
      if tops is None:
        tops = parts
      same = 0
      while same < min(len(tops), len(parts)) and tops[same] == parts[same]:
        same += 1
      tops = tops[:same]
      if not tops:
        return ''
  return ''.join(f'{part}/' for part in tops or ())


Members = dict[str, dict[Parts, str]]


def _split_members(
  tree: _Tree, path: str, notes: list[str]
) -> tuple[Members, _Tree, str]:
  """Each split's pictures: path inside the split -> key of the listing.

  Returns:
    The pictures; the tree inside the splits; how the splits came about.
  """
  folders = _find_splits(tree, path, notes)
  members: Members = {split: {} for split in picture_set.SPLITS}
  if not folders:
    for file, parts in tree.files.items():
      split = 'val' if roles.in_validation('/'.join(parts)) else 'train'
      members[split][parts] = file
    origin = (
      'no train/ and val/, so one image in ten is held out for val, by a hash '
      'of its name'
    )
    return members, tree, origin
  inside = [tree.below((folder,)) for folder in folders.values()]
  for split, part in zip(folders, inside, strict=True):
    members[split] = {parts: file for file, parts in part.files.items()}
  left = collections.Counter(
    parts[0] if len(parts) > 1 else ''
    for parts in tree.files.values()
    if len(parts) == 1 or parts[0] not in folders.values()
  )
  for top, count in sorted(left.items()):
    where = f'in {top}/' if top else 'beside the splits'
    notes.append(f'{count:,} images {where} are left out')
  inner = _Tree(
    {},
    set().union(*(part.folders for part in inside)),
    set().union(*(part.other for part in inside)),
  )
  if 'val' in folders:
    return (
      members,
      inner,
      ' and '.join(
        f'{folders[split]}/' for split in picture_set.SPLITS if split in folders
      )
      + ' are the splits',
    )
  for parts in list(members['train']):
    if roles.in_validation('/'.join(parts)):
      members['val'][parts] = members['train'].pop(parts)
  origin = (
    f'{folders["train"]}/ has no val/ beside it, so one of its images in ten '
    'is held out for val, by a hash of its name'
  )
  return members, inner, origin


def _find_splits(tree: _Tree, path: str, notes: list[str]) -> dict[str, str]:
  """The top folders that are splits: 'train', perhaps 'val' -> folder.

  Raises:
    DataError: folders that could be splits as well as classes.
  """
  given = {parts[0] for parts in tree.files.values() if len(parts) > 1}
  there = given | {parts[0] for parts in tree.folders}
  by_role: dict[str, list[str]] = {'train': [], 'val': [], 'test': []}
  tell = roles.folder_role
  if given and all(roles.word_role(folder) for folder in given):
    # train_images/ and val_images/, where every folder tells its split.
    tell = roles.word_role
  for folder in sorted(there):
    if found_role := tell(folder):
      by_role[found_role].append(folder)
  # The plain names settle it where there are several.
  for split, found in by_role.items():
    if split in found:
      by_role[split] = [split]
    # An empty folder is a split only where nothing else is.
    elif len(full := [folder for folder in found if folder in given]) == 1:
      by_role[split] = full
  trains, vals, tests = by_role['train'], by_role['val'], by_role['test']
  if not any(folder in given for folder in (*trains, *vals, *tests)):
    _refuse_inner_splits(tree, path)
    return {}
  for found in (trains, vals):
    if len(found) > 1:
      raise errors.DataError(
        f'{path} has {" and ".join(f"{name}/" for name in found)}; wanted '
        'train/ and val/: rename one, or take the other out'
      )
  classes = sorted(f for f in given if not tell(f))
  if trains and vals:
    return {'train': trains[0], 'val': vals[0]}
  if trains and not classes:
    return {'train': trains[0]}
  if trains:
    direct = any(
      len(parts) == 2 and parts[0] == trains[0] for parts in tree.files.values()
    )
    if not direct:
      return {'train': trains[0]}
    if not tests:
      # CIFAR-100 has a class `train`.
      notes.append(
        f'{trains[0]}/ holds images as {classes[0]}/ does, and is taken for '
        'a class'
      )
      return {}
  odd = [f for f in (*vals, *tests) if f in given]
  beside = f' beside {classes[0]}/' if classes else ' without train/'
  raise errors.DataError(
    f'{path} has {odd[0]}/{beside}; wanted train/ and val/, or class folders '
    f'alone: rename {odd[0]}/, take it out, or give the path of what to train '
    'on'
  )


def _refuse_inner_splits(tree: _Tree, path: str) -> None:
  """Raises DataError for splits inside class folders, as cat/train/."""
  inside: dict[str, set[str]] = {}
  for parts in tree.files.values():
    if len(parts) > 2 and (split := roles.folder_role(parts[1])):
      inside.setdefault(parts[0], set()).add(split)
  for folder, splits in sorted(inside.items()):
    if 'train' in splits and len(splits) > 1:
      raise errors.DataError(
        f'{path} has splits inside its folders, as {folder}/train; wanted '
        f'train/{folder} and val/{folder}: move them, or link to them so'
      )


def _class_names(
  members: Members, inner: _Tree, path: str, single: str, notes: list[str]
) -> tuple[str, ...]:
  """Class folders over both splits; () where there are none."""
  everything = [parts for part in members.values() for parts in part]
  loose = ['/'.join(parts) for parts in everything if len(parts) == 1]
  if loose and len(loose) < len(everything):
    _refuse_loose(members, loose, path)
  if loose:
    return (single,) if single else ()
  with_pictures = {parts[0] for parts in everything}
  own = {s: {parts[0] for parts in part} for s, part in members.items()}
  if (
    len(own['val']) == 1
    and len(own['train']) > 1
    and not (own['val'] & own['train'])
  ):
    # val/images of Tiny ImageNet is no class.
    _refuse_flat_val(members, path)
  with_others = {parts[0] for parts in inner.other if len(parts) > 1}
  folders = {parts[0] for parts in inner.folders}
  empty = folders - with_pictures - with_others
  if empty:
    notes.append(
      f'{_few(empty)} holds no files and keeps its label as a class'
      if len(empty) == 1
      else f'{_few(empty)} hold no files and keep their labels as classes'
    )
  if others := (folders & with_others) - with_pictures:
    notes.append(f'{_few(others)}: no images inside, so no class')
  names = with_pictures | empty
  by_text = sorted(names)
  if not all(re.fullmatch(r'[0-9]+', name) for name in names):
    notes.extend(synsets.notes(by_text))
    notes.extend(classes_lib.text_order(by_text))
    return tuple(by_text)
  by_number = sorted(names, key=lambda name: (int(name), name))
  if by_number != by_text:
    index = next(
      i
      for i, pair in enumerate(zip(by_number, by_text, strict=True))
      if pair[0] != pair[1]
    )
    notes.append(
      'class names are numbers and sorted as such: label '
      f'{index} is {by_number[index]}, not {by_text[index]}'
    )
  return tuple(by_number)


def _few(names: Iterable[str]) -> str:
  """The first of some folders, and the number of the others."""
  ordered = sorted(names)
  shown = ', '.join(f'{name}/' for name in ordered[:3])
  more = len(ordered) - 3
  return f'{shown} and {more:,} more' if more > 0 else shown


def _refuse_loose(members: Members, loose: Sequence[str], path: str) -> None:
  """Raises DataError for pictures beside class folders."""
  flat = [
    split
    for split, part in members.items()
    if part and all(len(parts) == 1 for parts in part)
  ]
  if flat == ['val']:
    _refuse_flat_val(members, path)
  total = sum(len(part) for part in members.values())
  raise errors.DataError(
    f'{path} has {len(loose)} images beside its class folders (such as '
    f'{min(loose)}) of {total} in all; wanted all images in class folders or '
    'none: move them'
  )


def _refuse_flat_val(members: Members, path: str) -> None:
  """Raises DataError for val images without the classes of train."""
  raise errors.DataError(
    f'{path} has class folders in train, and {len(members["val"])} images '
    'without any of them in val; give them labels with `python -m '
    f'launch.prepare --path={path} --labels=FILE --out=NEW`, or move them into '
    'class folders'
  )


def _make_split(
  members: Mapping[Parts, str],
  files: Mapping[str, File],
  classes: Sequence[str],
  is_single: bool,
  reader: ReaderMaker,
) -> picture_set.Split:
  """Orders the pictures of a split, by class and then by path."""
  members = {parts: key for parts, key in members.items() if key in files}
  label_of = {name: label for label, name in enumerate(classes)}
  has_folders = bool(classes) and not is_single
  labels_of = {
    parts: label_of[parts[0]] if has_folders else 0 for parts in members
  }
  ordered = sorted(members, key=lambda parts: (labels_of[parts], parts))
  keys = [members[parts] for parts in ordered]
  sizes = np.array([files[key].size for key in keys], np.int64)
  labels = np.array([labels_of[parts] for parts in ordered], np.int32)
  names = ['/'.join(parts) for parts in ordered]
  digest = picture_set.digest(classes, names, sizes, labels)
  # Earlier versions hashed the listing alone, and did not name a single class.
  former = picture_set.digest(
    () if is_single else classes, names, sizes, labels
  )
  read = reader([files[key] for key in keys])
  prefix = keys[0].removesuffix(names[0]) if keys else ''
  packed = packed_names.PackedNames(names)
  return picture_set.Split(
    packed, sizes, labels, read, digest, former=former, prefix=prefix
  )


def _note_shared(
  members: Members, files: Mapping[str, File], notes: list[str]
) -> None:
  """Notes pictures that are in both splits, as where val is a link to train."""
  train, val = (
    [files[key].identity for key in members[split].values() if key in files]
    for split in picture_set.SPLITS
  )
  known = set(train) - {None}
  if shared := sum(identity in known for identity in val):
    notes.append(
      f'{shared:,} of the {len(val):,} val images are the same '
      'files as train images: scores on them say nothing about new images'
    )
