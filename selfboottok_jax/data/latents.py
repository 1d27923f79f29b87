"""Reading a token cache: what frozen networks made of images, by index."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from grain import sources as grain_sources

from selfboottok_jax import errors
from selfboottok_jax.data import latent_files, latent_index, latent_statistics

# What reading a damaged ArrayRecord raises, which has checksums of its own.
_READ_ERRORS = (RuntimeError, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class _File:
  """A shard, as ArrayRecordDataSource takes one that it need not open yet."""

  filename: str
  take: int
  skip: int = 0

  @property
  def examples_in_shard(self) -> int:
    return self.take


class LatentSource:
  """What was made of the images of one split, by index.

  Attributes:
    class_names: of the labels.
    fingerprint: that of the images.
    max_scale: 1, as there is nothing to enlarge.
    index: what the cache tells of itself.
    image_size: side of the images.
    names: the fields that are read.
    statistics: of the codes.
  """

  max_scale = 1.0

  def __init__(
    self,
    folder: latent_files.Path,
    split: str,
    index: latent_index.Index,
    statistics: latent_statistics.Statistics,
    names: Sequence[str] | None = None,
  ):
    """Serves `names`, by default all; see `open_latents`."""
    self._folder, self._split, self.index = folder, split, index
    self.statistics = statistics
    self.names = tuple(index.shapes if names is None else names)
    self._told = index.splits[split]
    self.class_names = index.class_names
    self.fingerprint = self._told.fingerprint
    self.image_size = index.image_size
    files = []
    for shard in range(self._told.shards):
      first, end = self._told.bounds(shard)
      files.append(_File(str(self._file(shard)), end - first))
    self._records = grain_sources.ArrayRecordDataSource(files)

  def __len__(self) -> int:
    """Number of images."""
    return self._told.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one: float32 [2, ...] of each field, mirrored second; 'label'."""
    return self._read(index, slice(None))

  def side(self, index: int, side: int) -> dict[str, Any]:
    """Reads the fields of an image (0) or of its mirror image (1)."""
    element = self._read(index, slice(side, side + 1))
    fields = {name: element[name][0] for name in self.names}
    return {**fields, 'label': np.int32(element['label'])}

  def select(self, names: Sequence[str]) -> 'LatentSource':
    """The same with some fields alone; DataError for one that is not there."""
    missing = [name for name in names if name not in self.index.shapes]
    if missing:
      raise errors.DataError(
        f'the cache {self._folder} holds no {", ".join(missing)}, but '
        f'{", ".join(self.index.shapes)}; run launch.encode with this '
        'configuration, into a new folder'
      )
    return LatentSource(
      self._folder, self._split, self.index, self.statistics, names
    )

  def check_use(self, image_size: int, *, random_crop: bool) -> None:
    """ConfigError for what can be done with images alone."""
    if random_crop:
      raise errors.ConfigError(
        f'data.random_crop=True, but the cache {self._folder} holds centre '
        'crops; set data.random_crop=False, or leave data.cache empty'
      )
    if image_size != self.image_size:
      raise errors.ConfigError(
        f'data.image_size={image_size}, but the cache {self._folder} is of '
        f'images of {self.image_size}; set data.image_size={self.image_size}'
      )

  def check(
    self, tokenizer: str, teacher: str, dtype: str, encoding: Any
  ) -> None:
    """DataError unless the cache holds what an encoding would make.

    Args:
      tokenizer: the fingerprint of the tokenizer.
      teacher: what names the teacher; its weights are not read, and not
        compared.
      dtype: in which the teacher computes.
      encoding: what is wanted: `shapes` of the fields of an image, and how the
        'targets' among them are paired, `align_mode`.
    """
    self.select(list(encoding.shapes))
    wanted = {'tokenizer': tokenizer}
    if len(encoding.shapes) > 1:
      wanted |= {'teacher': teacher, 'teacher_dtype': dtype}
    if 'targets' in encoding.shapes:
      wanted['align_mode'] = encoding.align_mode
    there = {key: self.index.made_by[key] for key in wanted}
    for name, leaf in encoding.shapes.items():
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
    return latent_files.record_file(
      self._folder, self.index, self._split, shard
    )

  def _read(self, index: int, sides: slice) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      record = self._records[index]
      return latent_index.unpack(self.index, record, self.names, sides)
    except _READ_ERRORS as error:
      file = self._file(self._told.shard_of(index))
      raise latent_files.damaged(file, error) from error


def open_latents(folder: latent_files.Path, split: str) -> LatentSource:
  """Opens a split of a token cache.

  Sizes are compared here, contents when they are read.

  Raises:
    DataError: no cache, no such split, or shards that are missing, damaged or
      of another index.
  """
  folder = pathlib.Path(folder).expanduser()
  index = latent_files.read_index(folder)
  if split not in index.splits:
    raise errors.DataError(
      f'the cache {folder} has no {split} split, but '
      f'{", ".join(index.splits)}; run launch.encode again with '
      f'--splits={split}'
    )
  files = [
    latent_files.record_file(folder, index, split, shard)
    for shard in range(index.splits[split].shards)
  ]
  done = latent_files.split_file(folder, split)
  if not done.is_file():
    raise errors.DataError(
      f'the {split} split of the cache {folder} is incomplete: '
      f'{sum(file.is_file() for file in files)} of {len(files)} shards are '
      f'there; {latent_files.AGAIN}'
    )
  told = latent_files.read_json(done)
  try:
    digest, sizes = told['index'], dict(zip(files, told['bytes'], strict=True))
    statistics = latent_statistics.Statistics.from_json(told['statistics'])
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise latent_files.damaged(done, error) from error
  if digest != index.digest(split):
    raise errors.DataError(
      f'{folder / latent_files.INDEX} was changed since {split} was encoded; '
      'restore it, or encode into a new folder'
    )
  for file, size in sizes.items():
    actual = file.stat().st_size if file.is_file() else 'no'
    if actual != size:
      raise errors.DataError(
        f'{file} has {actual} bytes, wanted {size}; {latent_files.AGAIN}'
      )
  return LatentSource(folder, split, index, statistics)
