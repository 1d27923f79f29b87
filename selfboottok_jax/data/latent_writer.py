"""Writing a token cache, shard by shard, so that it can be gone on with.

A shard is written under a name that no reader looks at, and takes its own when
it is whole: whatever stops the writing costs the shards in hand and no other.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
from array_record.python import array_record_module

from selfboottok_jax import errors
from selfboottok_jax.data import latent_files, latent_index, latent_statistics

# A record to a chunk, for random access. Codes do not compress: zstd takes 8 %
# off white noise in float16, and halves the rate of reading.
_OPTIONS = 'group_size:1,uncompressed'
# What ArrayRecord adds to a record and to a file, at most.
_RECORD_OVERHEAD, _FILE_OVERHEAD = 128, 2**17


def pending_shards(
  folder: latent_files.Path, index: latent_index.Index, split: str
) -> list[int]:
  """The shards of a split that are not there, or not as they were written."""
  shards = range(index.splits[split].shards)
  return [s for s in shards if _sidecar(folder, index, split, s) is None]


def check_room(
  folder: latent_files.Path,
  index: latent_index.Index,
  shards: Mapping[str, Sequence[int]],
) -> int:
  """How many bytes some shards will take, or a few more.

  Raises:
    DataError: the disk has less.
  """
  record = index.record_bytes + _RECORD_OVERHEAD
  needed = 0
  for split, members in shards.items():
    for first, end in map(index.splits[split].bounds, members):
      # ArrayRecord puts 24 bytes into every 64 KiB.
      needed += round((end - first) * record * 1.001) + _FILE_OVERHEAD
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
    folder: latent_files.Path,
    index: latent_index.Index,
    split: str,
    shard: int,
  ):
    """Opens a file under a hidden name, over what was left of an earlier one.

    Raises:
      DataError: it cannot be written.
    """
    self._index, self._split = index, split
    self._file = latent_files.record_file(folder, index, split, shard)
    self._sidecar = self._file.with_suffix('.json')
    self._partial = self._file.with_name(
      f'.{self._file.name}.{os.getpid()}.partial'
    )
    for old in self._file.parent.glob(f'.{self._file.name}.*.partial'):
      old.unlink(missing_ok=True)
    first, self._end = index.splits[split].bounds(shard)
    self._next = first
    self._sums = latent_statistics.Sums()
    with self._errors():
      self._writer = array_record_module.ArrayRecordWriter(
        str(self._partial), _OPTIONS
      )

  @property
  def left(self) -> int:
    """Images that are still missing."""
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
      wanted = (len(labels), latent_index.SIDES, *shape)
      if stored[name].shape != wanted:
        raise ValueError(f'{name} is {stored[name].shape}; wanted {wanted}')
      self._check_finite(name, stored[name])
    self._sums.add(stored['codes'][:, 0])
    with self._errors():
      for record in latent_index.pack(self._index, stored, labels):
        self._writer.write(record)
    self._next += len(labels)

  def close(self) -> None:
    """Gives the shard its name; DataError where that cannot be done."""
    if self.left:
      raise ValueError(f'{self.left} images are missing')
    with self._errors():
      self._writer.close()
      with self._partial.open('rb') as file:
        os.fsync(file.fileno())
      told = {
        'index': self._index.digest(self._split),
        'bytes': self._partial.stat().st_size,
        'sums': self._sums.to_json(),
      }
      # The records last: they are whole where the name is seen.
      latent_files.write_json(self._sidecar, told)
      self._partial.replace(self._file)

  def abort(self) -> None:
    """Leaves nothing behind; may follow `close`."""
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
  def _errors(self):
    """What goes wrong with files, in one line."""
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
  folder: latent_files.Path, index: latent_index.Index, split: str
) -> latent_statistics.Statistics:
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
  statistics = latent_statistics.combine(
    latent_statistics.Sums(**told['sums']) for told in sidecars
  )
  told = {
    'index': index.digest(split),
    'bytes': [told['bytes'] for told in sidecars],
    'statistics': dataclasses.asdict(statistics),
  }
  latent_files.write_json(latent_files.split_file(folder, split), told)
  return statistics


def _sidecar(folder, index, split, shard):
  """What is told of a shard, or None unless it is whole and of this index."""
  file = latent_files.record_file(folder, index, split, shard)
  sidecar = file.with_suffix('.json')
  try:
    told = latent_files.read_json(sidecar)
    whole = told['bytes'] == file.stat().st_size
    latent_statistics.Sums(**told['sums'])
  except (errors.DataError, OSError, KeyError, TypeError):
    return None
  return told if whole and told['index'] == index.digest(split) else None
