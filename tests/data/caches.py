"""Small token caches whose codes are the pixels of their images."""

import dataclasses
import pathlib

import numpy as np

from selfboottok_jax import data, pixels
from selfboottok_jax.data import token_cache, token_cache_writer

SIZE = 8
MADE_BY = {
  'tokenizer': 'abc',
  'teacher': 'hog',
  'teacher_dtype': 'float32',
  'align_mode': 'repeat',
}
SHAPES = {'cls': (3,), 'codes': (SIZE, 3 * SIZE), 'targets': (2, 5)}


def images(split: str = 'train', length: int = 50) -> data.ProceduralSource:
  return data.ProceduralSource(split, SIZE, length=length)


def index_of(
  dtype: str = 'float32', *, shards: int = 3, apart: bool = False, **sources
) -> token_cache.Index:
  sources = sources or {'train': images()}
  return token_cache.Index(
    SIZE,
    dtype,
    SHAPES,
    data.ProceduralSource.class_names,
    MADE_BY,
    {
      name: token_cache.Split(len(source), shards, source.fingerprint)
      for name, source in sources.items()
    },
    apart,
  )


def encode(image: np.ndarray) -> dict[str, np.ndarray]:
  """Imitates a frozen network on a picture and its mirror image."""
  sides = np.stack([image, image[:, ::-1]])
  images = pixels.to_float(sides)
  return {
    'cls': images.mean((1, 2)),
    'codes': images.reshape(2, *SHAPES['codes']),
    'targets': images.reshape(2, -1)[:, :10].reshape(2, 2, 5),
  }


def batch_of(
  source: data.Source, first: int, end: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns the records that images of a source become, and their labels."""
  elements = [source[i] for i in range(first, end)]
  made = [encode(element['image']) for element in elements]
  labels = np.array([element['label'] for element in elements], np.int32)
  return {k: np.stack([m[k] for m in made]) for k in SHAPES}, labels


def write_shard(
  folder: pathlib.Path,
  index: token_cache.Index,
  split: str,
  shard: int,
  source: data.Source,
) -> None:
  """Writes a shard in two batches."""
  writer = token_cache_writer.ShardWriter(folder, index, split, shard)
  first, end = index.splits[split].bounds(shard)
  middle = (first + end) // 2
  for start, stop in ((first, middle), (middle, end)):
    writer.write(*batch_of(source, start, stop))
  writer.close()


def write(
  folder: pathlib.Path, index: token_cache.Index | None = None, **sources
) -> token_cache.Index:
  """Writes a whole cache, of 50 images in 3 shards unless told."""
  sources = sources or {'train': images()}
  index = index or index_of(**sources)
  token_cache.write_index(folder, index)
  for split, source in sources.items():
    for shard in token_cache_writer.pending_shards(folder, index, split):
      write_shard(folder, index, split, shard, source)
    token_cache_writer.finish(folder, index, split)
  return index


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Stands for a jax.ShapeDtypeStruct."""

  shape: tuple[int, ...]
