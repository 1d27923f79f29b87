"""Writes token caches shard by shard, so that a stopped command can continue.

A shard is written under a hidden name and renamed when it is whole: whatever
stops the writing costs the shards in hand and no other.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from selfboottok_jax import errors
from selfboottok_jax.data import token_cache

# A record to a chunk, for random access. Codes do not compress: zstd takes 8 %
# off white noise in float16, and halves the rate of reading.
_OPTIONS = 'group_size:1,uncompressed'
# What ArrayRecord adds to a record and to a file, at most.
_RECORD_OVERHEAD, _FILE_OVERHEAD = 128, 2**17


def pending_shards(
  folder: token_cache.Path, index: token_cache.Index, split: str
) -> list[int]:
  """Lists the shards of a split that are missing or damaged."""
  shards = range(index.splits[split].shards)
  return [s for s in shards if _sidecar(folder, index, split, s) is None]


def check_room(
  folder: token_cache.Path,
  index: token_cache.Index,
  shards: Mapping[str, Sequence[int]],
) -> int:
  """Returns the bytes that some shards will take, rounded up.

  Raises:
    DataError: the disk has less.
  """
  image = index.records_of_image * (index.record_bytes + _RECORD_OVERHEAD)
  needed = 0
  for split, members in shards.items():
    for first, end in map(index.splits[split].bounds, members):
      # ArrayRecord puts 24 bytes into every 64 KiB.
      needed += round((end - first) * image * 1.001) + _FILE_OVERHEAD
  path = pathlib.Path(folder).absolute()
  nearest = next(p for p in (path, *path.parents) if p.exists())
  free = shutil.disk_usage(nearest).free
  if needed > free:
    raise errors.DataError(
      f'{folder} would take {needed / 1e6:,.1f} MB, and there are '
      f'{free / 1e6:,.1f} MB free; make room, or choose another disk'
    )
  return needed


class ShardWriter:
  """Writes one shard; it exists once `close` has returned."""

  def __init__(
    self,
    folder: token_cache.Path,
    index: token_cache.Index,
    split: str,
    shard: int,
  ):
    """Opens a file under a hidden name; removes those of killed writers.

    Raises:
      DataError: it cannot be written.
    """
    self._index, self._split = index, split
    self._file = token_cache.record_file(folder, index, split, shard)
    self._sidecar = self._file.with_suffix('.json')
    self._partial = self._file.with_name(
      f'.{self._file.name}.{os.getpid()}.partial'
    )
    for old in self._file.parent.glob(f'.{self._file.name}.*.partial'):
      old.unlink(missing_ok=True)
    first, self._end = index.splits[split].bounds(shard)
    self._next = first
    self._sums = token_cache.Sums()
    with self._errors():
      self._writer = array_record_module.ArrayRecordWriter(
        str(self._partial), _OPTIONS
      )

  @property
  def left(self) -> int:
    """Number of images that are still missing."""
    return self._end - self._next

  def write(self, fields: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Appends images: [b, 2, ...] of each field, mirrored second; labels [b].

    Raises:
      DataError: numbers that the type of the cache cannot hold; a full disk.
    """
    stored = {}
    for name, shape in self._index.shapes.items():
      # What overflows is found just below.
      with np.errstate(over='ignore'):
        stored[name] = np.asarray(fields[name], self._index.stored)
      wanted = (len(labels), token_cache.SIDES, *shape)
      if stored[name].shape != wanted:
        raise ValueError(f'{name} is {stored[name].shape}; wanted {wanted}')
      self._check_finite(name, stored[name])
    self._sums.add(stored['codes'][:, 0])
    with self._errors():
      for record in token_cache.pack(self._index, stored, labels):
        self._writer.write(record)
    self._next += len(labels)

  def close(self) -> None:
    """Renames the whole shard to its name; DataError if that fails."""
    if self.left:
      raise ValueError(f'{self.left} images are missing')
    with self._errors():
      self._writer.close()
      # On disk before the rename, or a crash could leave an empty shard.
      with self._partial.open('rb') as file:
        os.fsync(file.fileno())
      content = {
        'index': self._index.digest(self._split),
        'bytes': self._partial.stat().st_size,
        'sums': self._sums.to_json(),
      }
      # The records get their name last: a reader that sees it sees a whole
      # shard, and a stop in between leaves a shard that is made again. Records
      # of an older cache go first, or the new sidecar would vouch for them.
      self._file.unlink(missing_ok=True)
      token_cache.write_json(self._sidecar, content)
      self._partial.replace(self._file)

  def abort(self) -> None:
    """Removes an unfinished file; may follow `close`."""
    with contextlib.suppress(Exception):
      self._writer.close()
    self._partial.unlink(missing_ok=True)

  def _check_finite(self, name: str, values: np.ndarray) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
      image = self._next + int(np.argmin(finite))
      raise errors.DataError(
        f'{name} of image {image} of {self._split} are not finite in '
        f'{self._index.dtype}; encode into a new folder with --dtype=float32, '
        'and if that changes nothing, look at the tokenizer'
      )

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    """Turns errors of the file system into a DataError of one line."""
    try:
      yield
    except FileNotFoundError as error:
      raise errors.DataError(
        f'{self._partial} has gone while it was written; is another '
        'launch.encode writing there? Let one of them finish'
      ) from error
    except (OSError, RuntimeError) as error:
      raise errors.DataError(
        f'{self._file} cannot be written: {error}; make room or choose '
        'another folder, the same command continues'
      ) from error


def finish(
  folder: token_cache.Path, index: token_cache.Index, split: str
) -> token_cache.Statistics:
  """Declares a split complete, and writes its statistics.

  Raises:
    DataError: a shard is missing.
  """
  shards = range(index.splits[split].shards)
  sidecars = [_sidecar(folder, index, split, shard) for shard in shards]
  missing = [shard for shard in shards if sidecars[shard] is None]
  if missing:
    raise errors.DataError(
      f'{folder} lacks shards of {split}, the first is {missing[0]}; wanted '
      'all of them in one folder that every process sees: give such an --out'
    )
  contents = [content for content in sidecars if content is not None]
  statistics = token_cache.combine(
    token_cache.Sums(**content['sums']) for content in contents
  )
  content = {
    'index': index.digest(split),
    'bytes': [content['bytes'] for content in contents],
    'statistics': dataclasses.asdict(statistics),
  }
  token_cache.write_json(token_cache.split_file(folder, split), content)
  return statistics


def _sidecar(
  folder: token_cache.Path, index: token_cache.Index, split: str, shard: int
) -> dict[str, Any] | None:
  """Reads a shard's .json file; None unless shard and index match it."""
  file = token_cache.record_file(folder, index, split, shard)
  sidecar = file.with_suffix('.json')
  try:
    content = token_cache.read_json(sidecar)
    whole = content['bytes'] == file.stat().st_size
    token_cache.Sums(**content['sums'])
  except (errors.DataError, OSError, KeyError, TypeError):
    return None
  return content if whole and content['index'] == index.digest(split) else None
