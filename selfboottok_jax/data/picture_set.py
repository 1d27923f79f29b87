"""Photographs of both splits, in whatever form a path holds them.

A module for each form (a folder, a tar, shards, ...) lists the pictures of both
splits as a `PictureSet`: names, labels and a function that reads a picture's
bytes. `PictureSource` decodes them, which is the same for all forms.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from selfboottok_jax import errors
from selfboottok_jax.data import pictures

SPLITS = ('train', 'val')
# Pictures of a split whose bytes are part of its fingerprint: enough to notice
# a data set that was resized or encoded anew, and read in a moment.
HASHED = 64

# Names of a disk need not be text.
UTF8 = ('utf-8', 'surrogateescape')

# Reads the bytes of a picture by its index. It is called by many threads at a
# time, and pickled to other processes.
Reader = Callable[[int], bytes]


@dataclasses.dataclass(frozen=True)
class Bad:
  """A picture that cannot be read.

  Attributes:
    path: its name in the data set.
    reason: what is wrong with it, as 'the file is empty'.
  """

  path: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Split:
  """The pictures of one split, in a fixed order, not decoded.

  Attributes:
    names: path of each picture inside the split.
    sizes: bytes of each picture.
    labels: the class of each picture, an index into the set's class names.
    read: reads a picture's bytes; raises DataError if it has gone.
    digest: sha256 (hex) of names, sizes and labels, see `digest`.
    known_fingerprint: the fingerprint, where a manifest holds it; '' computes
      it from the pictures.
    former: fingerprint of the same pictures in runs and caches of earlier
      versions; '' where there is none.
    prefix: what stands before names in the data set, as 'train/'.
  """

  # Millions of these are nothing to print.
  names: Sequence[str] = dataclasses.field(repr=False)
  sizes: Int[np.ndarray, '_'] = dataclasses.field(repr=False)
  labels: Int[np.ndarray, '_'] = dataclasses.field(repr=False)
  read: Reader
  digest: str
  known_fingerprint: str = ''
  former: str = ''
  prefix: str = ''

  def __len__(self) -> int:
    """Number of pictures."""
    return len(self.names)

  def path(self, index: int) -> str:
    """Returns the path of a picture in the data set."""
    return self.prefix + self.names[index]

  def select(
    self, kept: Int[np.ndarray, '_'], class_names: Sequence[str]
  ) -> 'Split':
    """Returns some of the pictures, given by their indices in order."""
    names = [self.names[i] for i in kept]
    sizes, labels = self.sizes[kept], self.labels[kept]
    listed = digest(class_names, names, sizes, labels)
    read = Selected(self.read, kept)
    return Split(names, sizes, labels, read, listed, prefix=self.prefix)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Sha256 (hex) of the listing, and of some of the pictures' bytes.

    It is the same whatever form the pictures are kept in.
    """
    if self.known_fingerprint:
      return self.known_fingerprint
    total = hashlib.sha256(self.digest.encode())
    for index in hashed_indices(len(self)):
      total.update(hashlib.sha256(self.read(index)).digest())
    return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class Selected:
  """Reads some of the pictures of another reader, given by their indices."""

  read: Reader
  kept: Int[np.ndarray, '_']

  def __call__(self, index: int) -> bytes:
    """Returns the bytes of a picture."""
    return self.read(int(self.kept[index]))


def hashed_indices(count: int) -> list[int]:
  """Returns the pictures that a fingerprint reads, spread over `count`."""
  return [i * count // HASHED for i in range(HASHED)] if count else []


def digest(
  class_names: Sequence[str],
  names: Sequence[str],
  sizes: Sequence[int] | Int[np.ndarray, '_'],
  labels: Sequence[int] | Int[np.ndarray, '_'],
) -> str:
  """Returns the sha256 (hex) of a split's listing.

  Args:
    class_names: of the set.
    names: path of each picture inside the split.
    sizes: bytes of each picture.
    labels: class of each picture.
  """
  total = hashlib.sha256('\0'.join(class_names).encode(*UTF8))
  for name, size, label in zip(names, sizes, labels, strict=True):
    total.update(f'\n{name}\0{int(size)}\0{int(label)}'.encode(*UTF8))
  return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class PictureSet:
  """Both splits of a data set, and what a user should know about them.

  Attributes:
    path: as the user named it.
    splits: 'train' and 'val'; either may be empty.
    class_names: the same for both splits; empty without classes.
    origin: how the splits came about, in one sentence without a full stop.
    notes: what else may surprise, a sentence each.
    skipped: number of files that are no pictures or of a kind that cannot be
      read, by suffix, as {'.heic': 3}.
    bad: pictures that the listing alone shows to be unreadable. They are in
      neither split.
  """

  path: str
  splits: Mapping[str, Split]
  class_names: tuple[str, ...]
  origin: str
  notes: tuple[str, ...] = ()
  skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
  bad: tuple[Bad, ...] = ()

  def __post_init__(self) -> None:
    """Checks that there are both splits."""
    assert set(self.splits) == set(SPLITS)

  @property
  def fingerprint(self) -> str:
    """Sha256 (hex) of both splits."""
    joined = '\n'.join(self.splits[name].fingerprint for name in SPLITS)
    return hashlib.sha256(joined.encode()).hexdigest()

  def count_classes(self, split: str) -> dict[str, int]:
    """Number of pictures of each class in a split, those without included."""
    counts = collections.Counter(self.splits[split].labels.tolist())
    return {name: counts[i] for i, name in enumerate(self.class_names)}

  def describe(self) -> tuple[str, str, str]:
    """Three lines: pictures and classes, how they were split, what is left out.

    Every training prints them before its first step.
    """
    kinds = len(self.class_names)
    classes = f'{kinds} classes' if kinds != 1 else '1 class'
    counts = ', '.join(f'{len(self.splits[name]):,} {name}' for name in SPLITS)
    empty = {
      name: sum(not n for n in self.count_classes(name).values())
      for name in SPLITS
      if len(self.splits[name])
    }
    lacking = [f'{n} of them without {s} images' for s, n in empty.items() if n]
    first = f'data: {counts} images, {classes if kinds else "no classes"}'
    first = ', '.join([first, *lacking]) + f' ({self.path})'
    second = 'split: ' + '; '.join([self.origin, *self.notes])
    left = [f'{n:,} {suffix}' for suffix, n in sorted(self.skipped.items())]
    if self.bad:
      left.append(
        f'{len(self.bad):,} unreadable (such as {self.bad[0].path}: '
        f'{self.bad[0].reason})'
      )
    return first, second, 'skipped: ' + (', '.join(left) or 'nothing')


class PictureSource:
  """Decoded pictures of one split, by index.

  Attributes:
    picture_set: both splits; None in another process.
    class_names: see `PictureSet`.
    fingerprint: sha256 (hex) of what determines the content.
    former_fingerprint: that of earlier versions, '' where there is none.
    max_scale: how far training enlarges pictures before it crops.
  """

  max_scale = 1.25

  def __init__(
    self,
    found: PictureSet,
    split: str,
    options: pictures.Options | None = None,
  ):
    """Serves the pictures of a split; `found` is kept as `picture_set`.

    Raises:
      DataError: the split is empty.
    """
    self._path, self._name = found.path, split
    self.picture_set: PictureSet | None = found
    self._split = found.splits[split]
    self._options = options or pictures.Options()
    self.class_names = found.class_names
    if not len(self._split):
      total = sum(len(part) for part in found.splits.values())
      raise errors.DataError(
        f'the {split} split of {found.path} is empty ({total} images in all); '
        f'put images into {split}/, or leave train/ and val/ out and give '
        'enough images for one in ten to be held out'
      )

  @property
  def fingerprint(self) -> str:
    """See the class."""
    content = self._split.fingerprint
    if self._options.exif:
      return content
    return hashlib.sha256(f'{content} as stored'.encode()).hexdigest()

  @property
  def former_fingerprint(self) -> str:
    """See the class."""
    # Earlier versions ignored the orientation.
    return '' if self._options.exif else self._split.former

  def __len__(self) -> int:
    """Number of pictures."""
    return len(self._split)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one: {'image': uint8 [h, w, 3], 'label': int}.

    Raises:
      PictureError: it cannot be decoded.
    """
    element = self.picture(index)
    return element | {'image': np.asarray(element['image'])}

  def picture(self, index: int) -> dict[str, Any]:
    """Reads one, its 'image' as a picture of Pillow's in RGB."""
    image = pictures.open_rgb(
      self._split.read(index), self.name(index), self._options
    )
    return {'image': image, 'label': int(self._split.labels[index])}

  def __getstate__(self) -> dict[str, Any]:
    """Leaves the other split behind, which workers do not need."""
    return vars(self) | {'picture_set': None}

  def of_split(self, split: str) -> 'PictureSource':
    """Returns another split of the same set, without listing it again."""
    assert self.picture_set is not None
    return PictureSource(self.picture_set, split, self._options)

  def as_stored(self) -> 'PictureSource':
    """Returns the pictures without their EXIF orientation."""
    stored = copy.copy(self)
    stored._options = dataclasses.replace(self._options, exif=False)
    return stored

  def name(self, index: int) -> str:
    """The path of a picture, for errors and reports."""
    return f'{self._path}/{self._split.path(index)}'

  @property
  def names(self) -> Sequence[str]:
    """The path of each picture inside the split."""
    return self._split.names

  @property
  def prefix(self) -> str:
    """The folder of the split, as 'val/'; names leave it out."""
    return self._split.prefix

  # grain prints its sources, and a path is all that a reader wants to see.
  def __repr__(self) -> str:
    """The path and the split."""
    return f'{self._path} ({self._name})'
