"""The same pictures in every form that they may be kept in."""

import functools
import io
import json
import pathlib
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import tensorflow_datasets
from pyarrow import parquet

from tests.data import trees

NAMES = ('aster', 'rose', 'tulip')


class Picture(NamedTuple):
  """A picture of a data set.

  Attributes:
    split: 'train' or 'val'.
    label: its class.
    name: without an ending, distinct.
    data: the file.
  """

  split: str
  label: int
  name: str
  data: bytes


@functools.cache
def pictures(each: int = 15, val: int = 5) -> tuple[Picture, ...]:
  """Some of each class, in the order of folders."""
  return tuple(
    Picture(split, label, f'{label}{i:03}', trees.png(1000 * label + i))
    for split, start, count in (('train', 0, each), ('val', each, val))
    for label in range(len(NAMES))
    for i in range(start, start + count)
  )


def of_split(split: str) -> list[Picture]:
  return [p for p in pictures() if p.split == split]


def write_folder(root: pathlib.Path) -> str:
  for p in pictures():
    file = root / p.split / NAMES[p.label] / f'{p.name}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(p.data)
  return str(root)


def write_tar(
  path: pathlib.Path, members: Iterable[tuple[str, bytes]]
) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def write_shards(root: pathlib.Path, size: int = 20) -> str:
  """Shards of so many pictures; classes as numbers, with names in .txt."""
  for split in ('train', 'val'):
    chosen = of_split(split)
    for shard, start in enumerate(range(0, len(chosen), size)):
      write_tar(
        root / f'{split}-{shard:06}.tar',
        (
          member
          for p in chosen[start : start + size]
          for member in (
            (f'{p.name}.cls', str(p.label).encode()),
            (f'{p.name}.png', p.data),
            (f'{p.name}.txt', NAMES[p.label].encode()),
          )
        ),
      )
  return str(root)


HUB = {
  'info': {
    'features': {
      'image': {'_type': 'Image'},
      'label': {'_type': 'ClassLabel', 'names': list(NAMES)},
    }
  }
}
IMAGE = pa.struct([('bytes', pa.binary()), ('path', pa.string())])


def write_parquet(
  path: pathlib.Path,
  columns: Mapping[str, Any],
  hub: Mapping[str, Any] | None = None,
  row_group_size: int = 8,
) -> pathlib.Path:
  """Writes columns; pictures are lists of bytes under 'image'."""
  arrays = {
    name: pa.array(values, IMAGE if name == 'image' else None)
    for name, values in columns.items()
  }
  table = pa.table(arrays)
  if hub is not None:
    table = table.replace_schema_metadata({'huggingface': json.dumps(hub)})
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(table, path, row_group_size=row_group_size)
  return path


def hub_columns(chosen: Sequence[Picture]) -> dict[str, Any]:
  return {
    'image': [{'bytes': p.data, 'path': f'{p.name}.png'} for p in chosen],
    'label': [p.label for p in chosen],
  }


def write_hub(root: pathlib.Path) -> str:
  """A data set as the hub lays it out, two files for train."""
  train = of_split('train')
  for number, chosen in enumerate((train[:17], train[17:])):
    write_parquet(
      root / 'data' / f'train-{number:05}-of-00002.parquet',
      hub_columns(chosen),
      HUB,
    )
  write_parquet(
    root / 'data' / 'validation-00000-of-00001.parquet',
    hub_columns(of_split('val')),
    HUB,
  )
  return str(root)


class Flowers(
  tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True
):
  """The pictures in the order given, as TFDS prepares any data set."""

  VERSION = tensorflow_datasets.core.Version('1.2.0')
  name = 'flowers'

  def _info(self):
    return tensorflow_datasets.core.DatasetInfo(
      builder=self,
      features=tensorflow_datasets.features.FeaturesDict(
        {
          'image': tensorflow_datasets.features.Image(),
          'label': tensorflow_datasets.features.ClassLabel(names=list(NAMES)),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      'train': self._generate_examples('train'),
      'validation': self._generate_examples('val'),
    }

  def _generate_examples(self, split):
    for index, p in enumerate(of_split(split)):
      yield index, {'image': io.BytesIO(p.data), 'label': p.label}


def write_tfds(data_dir: pathlib.Path) -> str:
  """Prepares the data set below `data_dir`; returns its folder."""
  builder = Flowers(data_dir=str(data_dir), file_format='array_record')
  builder.download_and_prepare()
  return str(builder.data_dir)
