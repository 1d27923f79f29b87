"""Prepared data sets: pictures in ArrayRecord files, as `prepare` writes them.

A prepared data set is a folder:

  dataset.json                        the index, written last
  train-00003-of-00010.array_record   the pictures of a shard
  train.tsv                           label, bytes and name of each picture

A record is a picture's file as it is, or resized and encoded again. Order,
labels and names are those of the tree that it was made of, and the fingerprint
too if nothing was resized: a training may go on with either.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from grain import sources as grain_sources
from jaxtyping import Int

from selfboottok_jax import errors, files
from selfboottok_jax.data import packed_names, picture_set, token_cache

INDEX = 'dataset.json'
VERSION = 1
KIND = 'selfboottok_jax pictures'
# What reading a damaged ArrayRecord raises, which has checksums of its own.
READ_ERRORS = (OSError, RuntimeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of records.

  Attributes:
    file: its name.
    images: number of records.
    bytes: its size.
    sha256: hash of its contents, hex.
  """

  file: str
  images: int
  bytes: int
  sha256: str


def is_prepared(path: str) -> bool:
  """True for the folder of a prepared data set."""
  return files.exists(files.as_path(path) / INDEX)


def open_records(path: str) -> picture_set.PictureSet:
  """Opens a prepared data set.

  Sizes of files are compared here, contents when they are read.

  Raises:
    ConfigError: a folder that is not on this machine.
    DataError: an index that is damaged or of another version, or files that do
      not fit it.
  """
  path = str(files.local_path('data.path', path, token_cache.ELSEWHERE))
  content = read_index(path)
  try:
    splits = {
      split: _open_split(path, split, content['splits'][split])
      for split in picture_set.SPLITS
    }
    return picture_set.PictureSet(
      path,
      splits,
      tuple(content['class_names']),
      content['origin'],
      tuple(content['notes']),
      # Those that were left out when it was made are no fault of this one.
      skipped=content['skipped'],
    )
  except (KeyError, TypeError, ValueError) as error:
    raise errors.DataError(
      f'{path}/{INDEX} is damaged ({type(error).__name__}: {error}); prepare '
      'the data set again'
    ) from error


def read_index(path: str) -> dict[str, Any]:
  """Reads dataset.json; DataError unless it is one of this version."""
  file = pathlib.Path(path, INDEX)
  try:
    content = json.loads(file.read_text('utf-8', 'surrogateescape'))
    kind, version = content['kind'], content['version']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.DataError(
      f'{file} cannot be read ({error}); prepare the data set again'
    ) from error
  if (kind, version) != (KIND, VERSION):
    raise errors.DataError(
      f'{file} is {kind!r} of version {version}; wanted {KIND!r} of version '
      f'{VERSION}: prepare the data set with this version'
    )
  return content


def shards_of(split: Mapping[str, Any]) -> list[Shard]:
  """The shards of a split of an index."""
  return [Shard(**shard) for shard in split['shards']]


def find_damaged(path: str) -> list[picture_set.Bad]:
  """Compares the shards of a data set with their hashes; reads all of them."""
  damaged = []
  for split in read_index(path)['splits'].values():
    for shard in shards_of(split):
      found = sha256_of(pathlib.Path(path, shard.file))
      if found != shard.sha256:
        reason = f'its sha256 is {found[:12]}, and was {shard.sha256[:12]}'
        damaged.append(picture_set.Bad(shard.file, reason))
  return damaged


def sha256_of(file: pathlib.Path) -> str:
  """Returns the hash of a file's contents, hex."""
  with file.open('rb') as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()


def write_rows(rows: Sequence[tuple[int, int, str]]) -> bytes:
  """Encodes label, bytes and name of each picture as lines of text."""
  lines = []
  for label, size, name in rows:
    # A name may have a line's end in it.
    safe = name.replace('\\', '\\\\').replace('\n', '\\n')
    lines.append(f'{label}\t{size}\t{safe}\n')
  return ''.join(lines).encode(*picture_set.UTF8)


def _read_rows(
  data: bytes,
) -> tuple[list[str], Int[np.ndarray, '_'], Int[np.ndarray, '_']]:
  """Inverse of `write_rows`: names, sizes and labels."""
  names, sizes, labels = [], [], []
  for line in data.decode(*picture_set.UTF8).split('\n')[:-1]:
    label, size, name = line.split('\t', 2)
    if '\\' in name:
      parts = name.split('\\\\')
      name = '\\'.join(part.replace('\\n', '\n') for part in parts)
    names.append(name)
    sizes.append(int(size))
    labels.append(int(label))
  return names, np.array(sizes, np.int64), np.array(labels, np.int32)


def _open_split(
  path: str, split: str, content: Mapping[str, Any]
) -> picture_set.Split:
  """The pictures of a split, by its part of the index."""
  file = pathlib.Path(path, f'{split}.tsv')
  data = _read(file)
  if hashlib.sha256(data).hexdigest() != content['rows_sha256']:
    raise errors.DataError(
      f'{file} is damaged; restore it, or prepare the data set again'
    )
  names, sizes, labels = _read_rows(data)
  shards = shards_of(content)
  for shard in shards:
    shard_file = pathlib.Path(path, shard.file)
    there = shard_file.stat().st_size if shard_file.is_file() else None
    if there != shard.bytes:
      found = 'is missing' if there is None else f'has {there:,} bytes'
      raise errors.DataError(
        f'{shard_file} {found}; wanted {shard.bytes:,} bytes: copy it '
        'again, or prepare the data set again'
      )
  return picture_set.Split(
    packed_names.PackedNames(names),
    sizes,
    labels,
    RecordReader(path, shards),
    content['digest'],
    known_fingerprint=content['fingerprint'],
    former=content['former'],
    prefix=content['prefix'],
  )


def _read(file: pathlib.Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise errors.DataError(
      f'{file} cannot be read ({error.strerror}); copy it again, or prepare '
      'the data set again'
    ) from error


class RecordReader:
  """Reads records of several files, by their place in all of them."""

  def __init__(self, path: str, shards: Sequence[Shard]):
    """Reads the shards of a folder in their order."""
    self._path, self._shards = path, tuple(shards)
    self._ends = np.cumsum([shard.images for shard in shards])
    # A split may be empty, and there is no source of no files.
    self._records: Sequence[bytes] = (
      ()
      if not shards
      else open_files(
        [(os.path.join(path, shard.file), shard.images) for shard in shards]
      )
    )

  def __call__(self, index: int) -> bytes:
    """Returns a record; DataError that names the shard if it is damaged."""
    try:
      return self._records[index]
    except READ_ERRORS as error:
      shard = self._shards[int(np.searchsorted(self._ends, index, 'right'))]
      raise errors.DataError(
        f'{self._path}/{shard.file} is damaged (its sha256 was '
        f'{shard.sha256[:12]}); copy it again, or prepare the data set again'
      ) from error


@dataclasses.dataclass(frozen=True)
class _File:
  """A shard for ArrayRecordDataSource, which then opens it only when read.

  With bare paths it would open every file at once to count its records.
  """

  filename: str
  take: int
  skip: int = 0

  @property
  def examples_in_shard(self) -> int:
    return self.take


def open_files(
  shards: Sequence[tuple[str, int]],
) -> grain_sources.ArrayRecordDataSource:
  """Opens ArrayRecord files, given with their numbers of records, as one."""
  return grain_sources.ArrayRecordDataSource(
    [_File(path, count) for path, count in shards]
  )
