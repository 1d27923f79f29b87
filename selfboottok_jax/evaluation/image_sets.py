"""Images of any model, and their originals: a folder, a tar or an .npz file.

Pairs are found by name. The picture `cat/7.jpg` belongs to `cat/7.png`, or to
`cat/7.jpg.png` where the folder has a `7.png` of its own. Arrays without names
are paired by their order.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from selfboottok_jax import data, errors, files, sizes
from selfboottok_jax.evaluation import npz_files
from selfboottok_jax.pretrained import store

Batch = dict[str, np.ndarray]
# The array of an .npz file that names its images.
NAMES = 'names'
# What `launch.sample` leaves in a folder.
_SAMPLING, _END, _IMAGES, _ARRAYS = (
  *('sampling.json', 'grid.png', 'images', 'samples.npz'),
)


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images in a fixed order.

  Attributes:
    path: the folder or file.
    names: a name for each image; () where they have none.
    count: number of images.
    image_size: (height, width) of the first image.
    fingerprint: sha256 (hex) of what determines the content.
    source: where they are read from.
    top: the folder below `path` that the names are relative to, as 'val/'.
  """

  path: str
  names: Sequence[str]
  count: int
  image_size: tuple[int, int]
  fingerprint: str
  source: data.PictureSource | npz_files.NpzFile
  top: str = ''

  def batches(
    self,
    batch_size: int,
    *,
    rows: Int[np.ndarray, '_'] | None = None,
    crop: sizes.Size | None = None,
  ) -> Iterator[Batch]:
    """Yields {'image': uint8 [b, h, w, 3], 'mask': bool [b]}, padded.

    Args:
      batch_size: of all processes together, each of which gets its share.
      rows: the images in the order wanted; all as they come by default.
      crop: size of centre crops of the images; None wants all of one size.

    Raises:
      DataError: an image of another size, or one that cannot be read; and rows
        in another order of an .npz file, which is read from its start.
    """
    order = np.arange(self.count) if rows is None else rows
    where = {
      'process_index': jax.process_index(),
      'process_count': jax.process_count(),
    }
    if isinstance(self.source, npz_files.NpzFile):
      if not np.array_equal(order, np.arange(self.count)):
        raise errors.DataError(
          f'{self.path} has its images in another order than what it is paired '
          'with; give a folder of them, or the same order'
        )
      if crop is not None and sizes.pair(crop) != self.image_size:
        raise errors.DataError(
          f'{self.path} has images of {sizes.describe(self.image_size)}, '
          f'wanted {sizes.describe(crop)}; give images of one size'
        )
      yield from self.source.batches(batch_size, **where)
      return
    source = self.source if crop else _OneSize(self.source, self.image_size)
    yield from data.make_row_dataset(
      source,
      order,
      batch_size=batch_size,
      image_size=crop or sizes.canonical(self.image_size),
      **where,
    )


@dataclasses.dataclass
class _OneSize:
  """Pictures of one size; one of another is an error."""

  source: data.PictureSource
  size: tuple[int, int]
  class_names: tuple[str, ...] = ()
  max_scale: float = 1.0

  @property
  def fingerprint(self) -> str:
    """That of the pictures."""
    return self.source.fingerprint

  def __len__(self) -> int:
    """Number of pictures."""
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one."""
    element = self.source[index]
    found = element['image'].shape[:2]
    if found != self.size:
      raise errors.DataError(
        f'{self.source.name(index)} is {sizes.describe(found)}, the first '
        f'image {sizes.describe(self.size)}; give images of one size'
      )
    return element


def open_images(
  path: str | os.PathLike[str], *, flag: str, split: str = 'val'
) -> ImageSet:
  """Opens images.

  Args:
    path: an .npz file with uint8 images in `arr_0`; a folder of
      `launch.sample`; or a folder, tar or other set of pictures, of which a
      split counts where it has splits.
    flag: the flag that gave the path, for errors.
    split: 'train' or 'val'.

  Raises:
    DataError: no images, images that cannot be read, or an .npz file with
      anything else in `arr_0`.
  """
  path = os.fspath(path)
  if not path:
    raise errors.ConfigError(f'--{flag}= is empty; wanted a folder or a file')
  if (sampled := _of_samples(files.as_path(path))) is not None:
    path = os.fspath(sampled)
  if path.lower().endswith('.npz'):
    return _open_arrays(path)
  source = data.open_all(path, split=split, flag=flag)
  first = source[0]['image']
  return ImageSet(
    path,
    source.names,
    len(source),
    first.shape[:2],
    source.fingerprint,
    source,
    source.prefix,
  )


def _of_samples(folder: files.Path) -> files.Path | None:
  """The images in a folder of `launch.sample`; None for any other path."""
  if not files.exists(folder / _SAMPLING):
    return None
  if not files.exists(folder / _END):
    raise errors.DataError(
      f'{folder} lacks samples; give its launch.sample command again first'
    )
  inside = folder / _IMAGES
  return inside if files.exists(inside) else folder / _ARRAYS


def _open_arrays(path: str) -> ImageSet:
  file = npz_files.NpzFile(path)
  image_size = file.image_size()
  count = file.shapes[npz_files.IMAGES][0]
  names: list[str] = []
  if NAMES in file.shapes:
    names = [str(name) for name in file.read(NAMES, (count,)).tolist()]
  digest = store.sha256(file.path)
  return ImageSet(path, names, count, image_size, digest, file)


def pair(samples: ImageSet, originals: ImageSet) -> Int[np.ndarray, '_']:
  """Finds the original of each sample, by its index.

  Raises:
    DataError: samples without an original; or arrays without names of other
      counts.
  """
  if not (samples.names and originals.names):
    if samples.count != originals.count:
      raise errors.DataError(
        f'{samples.count} images in {samples.path} and {originals.count} in '
        f'{originals.path}, which are paired by their order for want of names; '
        'give equally many, or an array `names` beside arr_0'
      )
    return np.arange(samples.count)
  best: dict[int, int] = {}
  for sample_keys, keys_of_originals in _ways(samples, originals.names):
    known = _unique(keys_of_originals)
    found = {i: known[key] for i, key in enumerate(sample_keys) if key in known}
    if len(found) > len(best):
      best = found
    if len(best) == samples.count:
      break
  if len(best) < samples.count:
    lost = [i for i in range(samples.count) if i not in best]
    some = ', '.join(samples.names[i] for i in lost[:3])
    raise errors.DataError(
      f'{len(lost)} of {samples.count} images in {samples.path} have no '
      f'original of their name among {originals.count} in {originals.path}, '
      f'such as {some}; give all originals, or take these images out'
    )
  rows = np.array([best[i] for i in range(samples.count)], np.int64)
  if len(set(rows.tolist())) < len(rows):
    raise errors.DataError(
      f'several images in {samples.path} have the same original in '
      f'{originals.path}; give each image once'
    )
  return rows


def _ways(
  samples: ImageSet, originals: Sequence[str]
) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
  """Yields the keys by which pairs may be found, the strictest way first.

  An original has two keys: its name without the ending, and all of its name.
  """
  without = [os.path.splitext(name)[0] for name in samples.names]
  both = [(os.path.splitext(name)[0], name) for name in originals]
  # Where all samples are of one class, its folder is part of their names too.
  yield [samples.top + key for key in without], both
  yield without, both
  # Somebody's folder need not have the folders of the originals.
  yield (
    [os.path.basename(key) for key in without],
    [(os.path.basename(a), os.path.basename(b)) for a, b in both],
  )


def _unique(keys: Sequence[tuple[str, str]]) -> Mapping[str, int]:
  """Index by key, for the keys that belong to one index alone."""
  found: dict[str, int] = {}
  several = set()
  for index, names in enumerate(keys):
    for key in set(names):
      if found.setdefault(key, index) != index:
        several.add(key)
  return {key: i for key, i in found.items() if key not in several}


def image_names(names: Sequence[str]) -> list[str]:
  """Names for images made of originals, by which `pair` finds these.

  They end in .png in place of the original's ending, or after it where two
  originals have the same name otherwise. None leads out of a folder.
  """
  stems = [os.path.splitext(name)[0] for name in names]
  times = collections.Counter(stems)
  kept = [n if times[s] > 1 else s for n, s in zip(names, stems, strict=True)]
  return [
    '/'.join(
      part for part in pathlib.PurePosixPath(name).parts if part.strip('./')
    )
    + '.png'
    for name in kept
  ]
