"""Token caches: the outputs of frozen encoders for a data set, on disk.

A cache is a folder that `launch.encode` wrote:

  cache.json                          the index
  train-00003-of-00010.array_record   two records for every image of a shard
  train-00003-of-00010.json           size and sums of that shard
  train.json                          all shards are there; their statistics

Each file appears whole or not at all. The last two repeat a digest of the
index.

An image has a record, and its mirror image has the next one: a training reads
the bytes of the side that it draws. A record is the fields of the index one
after another, little-endian and without padding, then the label. In caches of
version 1 an image has one record with both sides of each field.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from selfboottok_jax import errors, files, sizes, trees
from selfboottok_jax.data import records as record_files

# Version 1 has a record for each image, version 2 one for each of its sides.
VERSIONS = (1, 2)
DTYPES = ('float16', 'float32')
# The image and its mirror image.
SIDES = 2
_LABEL = {'name': 'label', 'shape': [], 'dtype': 'int32'}


@dataclasses.dataclass(frozen=True)
class Split:
  """Size and origin of a split, as the index has them.

  Attributes:
    count: number of images.
    shards: number of record files.
    fingerprint: fingerprint of the images.
  """

  count: int
  shards: int
  fingerprint: str

  def bounds(self, shard: int) -> tuple[int, int]:
    """First image of a shard, and the first image after it."""
    first, end = (s * self.count // self.shards for s in (shard, shard + 1))
    return first, end

  def shard_of(self, image: int) -> int:
    """Shard of an image; the inverse of `bounds`."""
    return -(-(image + 1) * self.shards // self.count) - 1


@dataclasses.dataclass(frozen=True)
class Index:
  """Everything that must be equal for two commands to write one cache.

  Attributes:
    image_size: side of the images, or (height, width).
    dtype: type of the stored numbers, one of DTYPES.
    shapes: shape of each field of an image, in the order of a record; one is
      'codes'.
    class_names: names of the labels.
    made_by: the networks that encoded: 'tokenizer', a fingerprint, 'teacher',
      a name, 'align_mode', and whatever else their numbers depend on.
    splits: by name.
    apart: each side of an image has a record of its own.

  Raises:
    ConfigError: an unknown type, or shards without images.
  """

  image_size: sizes.Size
  dtype: str
  shapes: Mapping[str, tuple[int, ...]]
  class_names: tuple[str, ...]
  made_by: Mapping[str, str]
  splits: Mapping[str, Split]
  apart: bool = False

  def __post_init__(self) -> None:
    """Raises ConfigError for a type or shards that cannot be stored."""
    if self.dtype not in DTYPES:
      raise errors.ConfigError(
        f'--dtype={self.dtype}; wanted one of {", ".join(DTYPES)}'
      )
    for name, split in self.splits.items():
      if not 1 <= split.shards <= split.count:
        raise errors.ConfigError(
          f'--shards={split.shards} of the {split.count:,} images of {name}; '
          'wanted 1 or more, and no more than images'
        )

  @property
  def stored(self) -> np.dtype:
    """Type of the numbers in a record, little-endian on every machine."""
    return np.dtype(self.dtype).newbyteorder('<')

  @property
  def record_bytes(self) -> int:
    """Size of a record in bytes."""
    numbers = sum(math.prod(shape) for shape in self.shapes.values())
    return self.sides_of_record * numbers * self.stored.itemsize + 4

  @property
  def records_of_image(self) -> int:
    """Number of records that an image has."""
    return SIDES if self.apart else 1

  @property
  def sides_of_record(self) -> int:
    """Number of sides that a record has."""
    return 1 if self.apart else SIDES

  def to_json(self) -> dict[str, Any]:
    """Returns the content of cache.json."""
    fields = [
      {'name': name, 'shape': [SIDES, *shape], 'dtype': self.dtype}
      for name, shape in self.shapes.items()
    ]
    return {
      'version': VERSIONS[self.apart],
      # As JSON has it, so that indices compare with what is on disk.
      'image_size': self.image_size
      if isinstance(self.image_size, int)
      else list(self.image_size),
      'fields': [*fields, _LABEL],
      'class_names': list(self.class_names),
      'made_by': dict(self.made_by),
      'splits': {k: dataclasses.asdict(v) for k, v in self.splits.items()},
    }

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> 'Index':
    """Inverse of `to_json`; KeyError, ValueError or the like for others."""
    *fields, _ = content['fields']
    index = cls(
      sizes.canonical(content['image_size']),
      fields[0]['dtype'],
      {f['name']: tuple(f['shape'][1:]) for f in fields},
      tuple(content['class_names']),
      content['made_by'],
      {name: Split(**split) for name, split in content['splits'].items()},
      content['version'] == VERSIONS[True],
    )
    named = {'tokenizer', 'teacher', 'align_mode'} <= index.made_by.keys()
    if not named or 'codes' not in index.shapes or index.to_json() != content:
      raise ValueError('it holds what no cache does')
    return index

  def digest(self, split: str) -> str:
    """SHA-256 of all that concerns a split; its other files repeat it."""
    content = self.to_json() | {
      'splits': dataclasses.asdict(self.splits[split])
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  def differences(self, other: 'Index') -> list[str]:
    """Lists what differs in another index; of splits, those in both."""
    common = self.splits.keys() & other.splits.keys()
    mine, theirs = (
      trees.flatten(
        {
          **index.to_json(),
          'fields': {
            name: {'shape': [SIDES, *shape], 'dtype': index.dtype}
            for name, shape in index.shapes.items()
          },
          'splits': {k: dataclasses.asdict(index.splits[k]) for k in common},
        }
      )
      for index in (self, other)
    )
    return [
      f'{key} is {_shown(mine.get(key))} there, {_shown(theirs.get(key))} here'
      for key in sorted(mine.keys() | theirs.keys())
      if mine.get(key) != theirs.get(key)
    ]


def pack(
  index: Index, fields: Mapping[str, np.ndarray], labels: np.ndarray
) -> list[bytes]:
  """Makes the records of a batch: fields [b, 2, ...] and labels [b]."""
  arrays = [np.ascontiguousarray(fields[k], index.stored) for k in index.shapes]
  whole = np.ascontiguousarray(labels, '<i4')
  if index.apart:
    arrays = [array.reshape(-1, *array.shape[2:]) for array in arrays]
    whole = np.repeat(whole, SIDES)
  return [
    b''.join([*(array[i].tobytes() for array in arrays), whole[i].tobytes()])
    for i in range(len(whole))
  ]


def unpack(
  index: Index, record: bytes, names: Sequence[str], sides: slice
) -> dict[str, Any]:
  """Reads some fields of a record, float32 [sides, ...], and the label.

  `sides` are of those that the record has.

  Only the fields asked for are converted: conversion is most of the time that
  reading takes.
  """
  out, offset, held = {}, 0, index.sides_of_record
  for name, shape in index.shapes.items():
    size = held * math.prod(shape)
    if name in names:
      flat = np.frombuffer(record, index.stored, size, offset)
      out[name] = flat.reshape(held, *shape)[sides].astype(np.float32)
    offset += size * index.stored.itemsize
  return {**out, 'label': int(np.frombuffer(record, '<i4', 1, offset)[0])}


def _shown(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 40 else f'{text[:37]}...'


INDEX = 'cache.json'
Path = str | os.PathLike[str]

# ArrayRecord is a library of its own, which knows no object store.
ELSEWHERE = (
  'ArrayRecord files are read and written on local disks alone; wanted a '
  'folder there, copied with gcloud storage cp -r FROM TO'
)
AGAIN = 'run launch.encode again with the same flags'
# Errors that an object of another form raises when it is taken for an index.
_NO_INDEX = (
  AttributeError, IndexError, KeyError, TypeError, ValueError,
  errors.ConfigError,
)  # fmt: skip


def record_file(
  folder: Path, index: Index, split: str, shard: int
) -> pathlib.Path:
  """Path of a shard's records; the file beside it ends in .json."""
  shards = index.splits[split].shards
  name = f'{split}-{shard:05d}-of-{shards:05d}.array_record'
  return pathlib.Path(folder, name)


def split_file(folder: Path, split: str) -> pathlib.Path:
  """Path of the file that marks a split as complete."""
  return pathlib.Path(folder, f'{split}.json')


def read_index(folder: Path) -> Index:
  """Reads cache.json; DataError if it is absent or of another format."""
  path = pathlib.Path(folder, INDEX)
  if not path.is_file():
    raise errors.DataError(
      f'{folder} is no token cache: it has no {INDEX}; wanted the --out of '
      'launch.encode'
    )
  content = read_json(path)
  if content.get('version') not in VERSIONS:
    raise errors.DataError(
      f'{path} is of version {content.get("version")!r}; wanted '
      f'{" or ".join(map(str, VERSIONS))}: encode into a new folder'
    )
  try:
    return Index.from_json(content)
  except _NO_INDEX as error:
    raise damaged(path, error) from error


def agree(folder: Path, given: Index) -> Index:
  """Merges `given` with the index that a folder has already, if any.

  The result has the splits of both. Nothing is written yet.

  Raises:
    ConfigError: the folder holds something else; says what differs.
    DataError: its index is damaged.
  """
  path = pathlib.Path(folder)
  if not (path / INDEX).exists():
    if not files.is_vacant(path):
      raise errors.ConfigError(
        f'--out={folder} is not empty and holds no {INDEX}; choose a new '
        'folder, nothing is overwritten'
      )
    return given
  there = read_index(path)
  differences = there.differences(given)
  if differences:
    hidden = len(differences) - 3
    more = f'; and {hidden} more' if hidden > 0 else ''
    raise errors.ConfigError(
      f'--out={folder} holds a cache of other settings: '
      f'{"; ".join(differences[:3])}{more}; give the same, or choose another '
      'folder'
    )
  return dataclasses.replace(given, splits={**there.splits, **given.splits})


def write_index(folder: Path, index: Index) -> None:
  """Makes the folder and its index."""
  path = pathlib.Path(folder, INDEX)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, index.to_json())


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; DataError for anything else."""
  try:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
      raise ValueError('it holds no object')
  except (OSError, ValueError) as error:
    raise damaged(path, error) from error
  return content


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON object atomically and durably.

  A file with the same content stays untouched: its modification time
  stays the time at which it was made.
  """
  data = (json.dumps(content, indent=2) + '\n').encode()
  if not path.is_file() or path.read_bytes() != data:
    files.write_atomically(path, data, durable=True)


def damaged(path: pathlib.Path, error: Exception) -> errors.DataError:
  """Makes the error for a file with other contents than were written."""
  # Without the index nobody knows what the other files are.
  remedy = (
    'restore it, or encode into a new folder'
    if path.name == INDEX
    else f'delete it and {AGAIN}'
  )
  reason = ' '.join(str(error).split())[:80] or type(error).__name__
  return errors.DataError(f'{path} is damaged ({reason}); {remedy}')


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Mean and deviation of a split's codes, without the mirror images.

  Attributes:
    count: number of images.
    mean: mean over everything.
    std: standard deviation over everything.
    channel_mean: mean of every channel, over images and tokens.
    channel_std: standard deviation of every channel.
  """

  count: int
  mean: float
  std: float
  channel_mean: tuple[float, ...]
  channel_std: tuple[float, ...]

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> 'Statistics':
    """Inverse of `dataclasses.asdict` after JSON."""
    values: dict[str, Any] = {
      k: tuple(v) if isinstance(v, list) else v for k, v in content.items()
    }
    return cls(**values)


class Sums:
  """Running sums over codes, in float64.

  Attributes:
    images: number of images added.
    rows: number of vectors added, several to each image.
    total: sum of the vectors [e].
    square: sum of their squares [e].
  """

  def __init__(
    self,
    images: int = 0,
    rows: int = 0,
    total: float | list[float] = 0.0,
    square: float | list[float] = 0.0,
  ):
    """Starts from nothing, or from sums that `to_json` returned."""
    self.images, self.rows = images, rows
    self.total: np.ndarray = np.asarray(total, np.float64)
    self.square: np.ndarray = np.asarray(square, np.float64)

  def add(self, codes: Float[np.ndarray, 'b *k e']) -> None:
    """Adds a batch of codes."""
    wide = codes.astype(np.float64).reshape(-1, codes.shape[-1])
    self.images += len(codes)
    self.rows += len(wide)
    self.total = self.total + wide.sum(0)
    self.square = self.square + np.square(wide).sum(0)

  def to_json(self) -> dict[str, Any]:
    """Returns the constructor's arguments for JSON, without rounding."""
    return {
      'images': self.images,
      'rows': self.rows,
      'total': self.total.tolist(),
      'square': self.square.tolist(),
    }


def combine(parts: Iterable[Sums]) -> Statistics:
  """Statistics of everything that was added to one or more `parts`."""
  parts = list(parts)
  rows = sum(part.rows for part in parts)
  # An empty part has sums of shape (), which must broadcast with [e].
  zero = np.zeros(())
  mean = sum((part.total for part in parts), start=zero) / rows
  power = sum((part.square for part in parts), start=zero) / rows
  # Rounding may leave a constant channel a variance just below 0.
  std = np.sqrt(np.maximum(power - mean**2, 0))
  whole = float(mean.mean())
  return Statistics(
    count=sum(part.images for part in parts),
    mean=whole,
    std=float(np.sqrt(max(power.mean() - whole**2, 0))),
    channel_mean=tuple(mean.tolist()),
    channel_std=tuple(std.tolist()),
  )


class TokenCache:
  """The encoders' outputs for the images of one split, by index.

  Attributes:
    class_names: names of the labels.
    fingerprint: fingerprint of the images.
    max_scale: 1, as nothing can be enlarged.
    index: the cache's index.
    image_size: side of the images, or (height, width).
    names: the fields that are read.
    statistics: statistics of the codes.
  """

  max_scale = 1.0

  def __init__(
    self,
    folder: Path,
    split: str,
    index: Index,
    statistics: Statistics,
    names: Sequence[str] | None = None,
  ):
    """Serves `names`, by default all; see `open_token_cache`."""
    self._folder, self._split, self.index = folder, split, index
    self.statistics = statistics
    self.names = tuple(index.shapes if names is None else names)
    self._size = index.splits[split]
    self.class_names = index.class_names
    self.fingerprint = self._size.fingerprint
    self.image_size = index.image_size
    files = []
    for shard in range(self._size.shards):
      first, end = self._size.bounds(shard)
      records = (end - first) * index.records_of_image
      files.append((str(self._file(shard)), records))
    self._records = record_files.open_files(files)

  def __len__(self) -> int:
    """Number of images."""
    return self._size.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads an image's fields, float32 [2, ...] with the mirrored second."""
    if not self.index.apart:
      return self._read(index, 0, slice(None))
    sides = [self._read(index, side, slice(None)) for side in range(SIDES)]
    fields = {
      name: np.concatenate([side[name] for side in sides])
      for name in self.names
    }
    return {**fields, 'label': sides[0]['label']}

  def side(self, index: int, side: int) -> dict[str, Any]:
    """Reads the fields of an image (0) or of its mirror image (1)."""
    if self.index.apart:
      element = self._read(index, side, slice(None))
    else:
      element = self._read(index, 0, slice(side, side + 1))
    fields = {name: element[name][0] for name in self.names}
    return {**fields, 'label': np.int32(element['label'])}

  def select(self, names: Sequence[str]) -> 'TokenCache':
    """Returns the cache with some fields only; DataError for a missing one."""
    missing = [name for name in names if name not in self.index.shapes]
    if missing:
      raise errors.DataError(
        f'the cache {self._folder} holds no {", ".join(missing)}, but '
        f'{", ".join(self.index.shapes)}; run launch.encode with this '
        'configuration, into a new folder'
      )
    return TokenCache(
      self._folder, self._split, self.index, self.statistics, names
    )

  def check_use(self, image_size: sizes.Size, *, random_crop: bool) -> None:
    """Raises ConfigError for uses that need images."""
    if random_crop:
      raise errors.ConfigError(
        f'data.random_crop=True, but the cache {self._folder} holds centre '
        'crops; set data.random_crop=False, or leave data.cache empty'
      )
    if image_size != self.image_size:
      raise errors.ConfigError(
        f'data.image_size={image_size}, but the cache {self._folder} is of '
        f'images of {self.image_size}; set '
        f'data.image_size={sizes.as_flag(self.image_size)}'
      )

  def check(
    self,
    tokenizer: str,
    teacher: str,
    dtype: str,
    shapes: Mapping[str, Any],
    align_mode: str,
  ) -> None:
    """Raises DataError unless the cache fits this training.

    Args:
      tokenizer: the fingerprint of the tokenizer.
      teacher: what names the teacher; its weights are not read, and not
        compared.
      dtype: in which the teacher computes.
      shapes: arrays or shape structs of the fields that the losses read of an
        image, by name.
      align_mode: pairing that 'targets' must have been made with.
    """
    self.select(list(shapes))
    wanted: dict[str, Any] = {'tokenizer': tokenizer}
    if len(shapes) > 1:
      wanted |= {'teacher': teacher, 'teacher_dtype': dtype}
    if 'targets' in shapes:
      wanted['align_mode'] = align_mode
    there: dict[str, Any] = {key: self.index.made_by[key] for key in wanted}
    for name, leaf in shapes.items():
      there[name], wanted[name] = self.index.shapes[name], tuple(leaf.shape)
    for key, value in wanted.items():
      if there[key] != value:
        raise errors.DataError(
          f'the cache {self._folder} was made with {key}={there[key]}, this '
          f'training has {value}; give it the same, or run launch.encode with '
          'this configuration, into a new folder'
        )

  def __repr__(self) -> str:
    """The folder and the split, for logs."""
    return f'token cache {self._folder} ({self._split})'

  def _file(self, shard: int) -> pathlib.Path:
    return record_file(self._folder, self.index, self._split, shard)

  def _read(self, index: int, record: int, sides: slice) -> dict[str, Any]:
    """Reads some sides of one of an image's records."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      place = index * self.index.records_of_image + record
      return unpack(self.index, self._records[place], self.names, sides)
    except record_files.READ_ERRORS as error:
      file = self._file(self._size.shard_of(index))
      raise damaged(file, error) from error


def open_token_cache(folder: Path, split: str) -> TokenCache:
  """Opens a split of a token cache.

  Sizes are compared here, contents when they are read.

  Raises:
    ConfigError: a folder that is not on this machine.
    DataError: no cache, no such split, or shards that are missing, damaged or
      of another index.
  """
  folder = files.local_path('data.cache', folder, ELSEWHERE)
  index = read_index(folder)
  if split not in index.splits:
    raise errors.DataError(
      f'the cache {folder} has no {split} split, but '
      f'{", ".join(index.splits)}; run launch.encode again with '
      f'--splits={split}'
    )
  shards = [
    record_file(folder, index, split, shard)
    for shard in range(index.splits[split].shards)
  ]
  done = split_file(folder, split)
  if not done.is_file():
    raise errors.DataError(
      f'the {split} split of the cache {folder} is incomplete: '
      f'{sum(file.is_file() for file in shards)} of {len(shards)} shards are '
      f'there; {AGAIN}'
    )
  content = read_json(done)
  try:
    digest, sizes = (
      content['index'],
      dict(zip(shards, content['bytes'], strict=True)),
    )
    statistics = Statistics.from_json(content['statistics'])
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise damaged(done, error) from error
  if digest != index.digest(split):
    raise errors.DataError(
      f'{folder / INDEX} was changed since {split} was encoded; '
      'restore it, or encode into a new folder'
    )
  for file, size in sizes.items():
    actual = file.stat().st_size if file.is_file() else 'no'
    if actual != size:
      raise errors.DataError(
        f'{file} has {actual} bytes, wanted {size}; {AGAIN}'
      )
  return TokenCache(folder, split, index, statistics)
