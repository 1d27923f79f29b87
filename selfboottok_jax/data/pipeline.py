"""Builds training and evaluation batches from pictures or token caches.

Training batches are endless, shuffled and augmented; evaluation batches go
once over a source in a fixed order. Several processes share each batch, and
the rows depend on seed and step alone, not on the number of processes.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from selfboottok_jax import errors, sizes
from selfboottok_jax.data import cores, sources, token_cache, transforms

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainPictures:
  """Reads pictures and augments them at random."""

  source: sources.Source
  transform: transforms.TrainTransform

  def __call__(self, index: int, rng: np.random.Generator) -> Row:
    """Reads and augments one."""
    return self.transform(self.source[index], rng)


@dataclasses.dataclass(frozen=True)
class TrainCodes:
  """Reads the cached fields of an image or of its mirror image."""

  source: token_cache.TokenCache
  flip: bool

  def __call__(self, index: int, rng: np.random.Generator) -> Row:
    """Reads one, mirrored where `TrainTransform` mirrors a centre crop."""
    return self.source.side(index, int(transforms.mirrors(self.flip, rng)))


@dataclasses.dataclass(frozen=True)
class EvalPictures:
  """Centre crops, uint8."""

  source: sources.Source
  image_size: sizes.Size

  def __call__(self, index: int) -> Row:
    """Reads and crops one."""
    element = self.source[index]
    image = transforms.center_crop(element['image'], self.image_size)
    return {'image': image, 'label': np.int32(element['label'])}

  def blank(self) -> Row:
    """Padding: black, of class 0."""
    shape = (*sizes.pair(self.image_size), 3)
    return {'image': np.zeros(shape, np.uint8), 'label': np.int32(0)}


@dataclasses.dataclass(frozen=True)
class EvalCodes:
  """Reads the cached fields of images, never mirrored."""

  source: token_cache.TokenCache

  def __call__(self, index: int) -> Row:
    """Reads one."""
    return self.source.side(index, 0)

  def blank(self) -> Row:
    """Padding: zeros, of class 0."""
    shapes = {
      name: self.source.index.shapes[name] for name in self.source.names
    }
    zeros = {name: np.zeros(s, np.float32) for name, s in shapes.items()}
    return {**zeros, 'label': np.int32(0)}


EvalRows = EvalPictures | EvalCodes


def train_rows(
  source: sources.Source,
  image_size: sizes.Size,
  *,
  max_scale: float | None,
  flip: bool,
  random_crop: bool,
) -> Callable[[int, np.random.Generator], Row]:
  """Returns the reader of training rows; ConfigError for unfit settings."""
  if isinstance(source, token_cache.TokenCache):
    source.check_use(image_size, random_crop=random_crop)
    return TrainCodes(source, flip)
  scale = source.max_scale if max_scale is None else max_scale
  return TrainPictures(
    source, transforms.TrainTransform(image_size, scale, flip, random_crop)
  )


def eval_rows(source: sources.Source, image_size: sizes.Size) -> EvalRows:
  """Returns the reader of evaluation rows; ConfigError for a wrong size."""
  if isinstance(source, token_cache.TokenCache):
    source.check_use(image_size, random_crop=False)
    return EvalCodes(source)
  return EvalPictures(source, image_size)


_SHUFFLE, _AUGMENT = range(2)


def make_train_dataset(
  source: sources.Source,
  *,
  batch_size: int,
  image_size: sizes.Size,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = cores.BY_CORES,
  num_workers: int = 0,
  cores_shared_by: int = 1,
  max_scale: float | None = None,
  flip: bool = True,
  random_crop: bool = True,
) -> 'TrainBatches':
  """Starts endless training batches; call `close()` when done.

  A cache in place of pictures gives the same order and, without random crops,
  the same flips.

  Args:
    source: pictures or a cache; every epoch comes in a new order, and a source
      smaller than a batch is repeated within it.
    batch_size: of all processes together.
    image_size: pixels a side, or (height, width).
    seed: of order and augmentation.
    start_step: the first batch is that of this step of an endless run.
    process_index: which rows of the global batch: their concatenation in order
      of the process is the batch of a single process.
    process_count: how many processes share a batch.
    num_threads: in this process, or in each worker; 0 works in the caller's,
      -1 is by the cores of the machine, see `cores.choose`.
    num_workers: processes that prepare batches; 0 for threads alone, -1 as
      above.
    cores_shared_by: number of such processes, this one included, that share
      the cores of a machine.
    max_scale: see `transforms.TrainTransform`; None takes the source's.
    flip: see there.
    random_crop: see there.

  Returns:
    Iterator of {'image': uint8 [b, h, w, 3], 'label': int32 [b]}, b =
    batch_size / process_count; of a cache its fields, float32, in place of
    images. A damaged picture or record raises DataError here.

  Raises:
    ConfigError: a batch size that processes cannot share; random crops of a
      cache, or one of another size.
  """
  local = _local_batch(batch_size, process_count)
  draw = train_rows(
    source, image_size, max_scale=max_scale, flip=flip, random_crop=random_crop
  )
  rows = (
    grain.MapDataset.range(len(source))
    .shuffle(seed=_stream(seed, _SHUFFLE))
    .repeat()
    .random_map(draw, seed=_stream(seed, _AUGMENT))
  )
  # Processes are split after the shuffle, so that their number does not
  # change the global batch.
  share = _Share(rows, start_step, batch_size, local, process_index)
  batches = grain.MapDataset.source(share).batch(local)
  threads, workers = cores.choose(
    source,
    num_threads,
    num_workers,
    shared_by=cores_shared_by,
    batch_bytes=local * _row_bytes(source, image_size),
  )
  # Each worker prepares as many as this process would without any, and one
  # more of each is handed over.
  ahead = (_ahead(threads) + 1) * max(workers, 1)
  return TrainBatches(iter(_prefetch(batches, threads, workers)), ahead)


def make_eval_dataset(
  source: sources.Source,
  *,
  batch_size: int,
  image_size: sizes.Size,
  num_images: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = cores.BY_CORES,
  num_workers: int = 0,
  cores_shared_by: int = 1,
) -> 'EvalBatches':
  """Makes one pass over a source under ADM's centre crop.

  Args:
    source: pictures or a cache.
    batch_size: of all processes together.
    image_size: pixels a side, or (height, width).
    num_images: at most so many, spread evenly over the source, whose order
      is by class; None for all.
    process_index: which rows of each batch, as in `make_train_dataset`.
    process_count: how many processes share a batch.
    num_threads: as in `make_train_dataset`.
    num_workers: as there, but -1 is 0: every pass would start them anew.
    cores_shared_by: as there.

  Raises:
    ConfigError: a batch size that processes cannot share; a cache of another
      image size.
  """
  count = len(source) if num_images is None else min(num_images, len(source))
  indices = np.arange(count) * len(source) // max(count, 1)
  return make_row_dataset(
    source,
    indices,
    batch_size=batch_size,
    image_size=image_size,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
    num_workers=num_workers,
    cores_shared_by=cores_shared_by,
  )


def make_row_dataset(
  source: sources.Source,
  indices: Int[np.ndarray, '_'],
  *,
  batch_size: int,
  image_size: sizes.Size,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = cores.BY_CORES,
  num_workers: int = 0,
  cores_shared_by: int = 1,
) -> 'EvalBatches':
  """Makes one pass over chosen rows; else as `make_eval_dataset`.

  `indices` are of the source, in the order wanted; -1 is padding.
  """
  local = _local_batch(batch_size, process_count)
  # Every process needs the same number of batches: they meet in each one.
  padding = -len(indices) % batch_size
  padded = np.pad(indices, (0, padding), constant_values=-1)
  share = padded.reshape(-1, process_count, local)[:, process_index].ravel()
  rows = _Rows(eval_rows(source, image_size), share)
  count = int(np.sum(indices >= 0))
  if num_workers == cores.BY_CORES:
    num_workers = 0
  num_threads, num_workers = cores.choose(
    source, num_threads, num_workers, shared_by=cores_shared_by
  )
  return EvalBatches(rows, count, local, num_threads, num_workers)


class TrainBatches:
  """Endless batches; owns the threads and workers that prepare them.

  They end with `close()`, with the object, or with the process.

  Attributes:
    ahead: the most batches that are prepared before they are asked for.
  """

  def __init__(self, iterator: grain.DatasetIterator, ahead: int):
    """Takes over a grain iterator, which nobody else may hold."""
    self.ahead = ahead
    # Held in a box that the finaliser empties: a grain iterator that is left
    # to the interpreter's own shutdown leaks shared memory and complains,
    # even if it was closed.
    self._box = [iterator]
    self._finalizer = weakref.finalize(self, _close, self._box)

  def __iter__(self) -> 'TrainBatches':
    """Returns itself."""
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next step's batch; ends once closed."""
    if not self._box:
      raise StopIteration
    return next(self._box[0])

  def close(self) -> None:
    """Stops threads and workers; may be called again."""
    self._finalizer()


@dataclasses.dataclass(frozen=True)
class EvalBatches:
  """Batches in a fixed order; `len` is their number; may be read again.

  Each is {'image': uint8 [b, h, w, 3], 'label': int32 [b], 'mask': bool [b]},
  of a cache with its fields, float32, in place of images; the last one is
  padded with zeros, where mask is False. All processes get the same number.

  Attributes:
    count: pictures in the batches of all processes together.
  """

  rows: '_Rows'
  count: int
  local: int
  num_threads: int
  num_workers: int

  def __len__(self) -> int:
    """Number of batches."""
    return len(self.rows) // self.local

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Reads the batches; threads end when the reader stops."""
    batches = grain.MapDataset.source(self.rows).batch(self.local)
    iterator = iter(_prefetch(batches, self.num_threads, self.num_workers))
    with contextlib.closing(iterator):
      yield from iterator


@dataclasses.dataclass(frozen=True)
class _Share:
  """One process's rows of the endless stream, from a step on."""

  rows: Any
  start_step: int
  batch_size: int
  local: int
  process_index: int

  def __len__(self) -> int:
    # Whole batches, or the last index would wrap within one.
    return sys.maxsize // self.local * self.local

  def __getitem__(self, index: int) -> dict[str, Any]:
    step, row = divmod(index, self.local)
    first = (self.start_step + step) * self.batch_size
    return self.rows[first + self.process_index * self.local + row]


@dataclasses.dataclass(frozen=True)
class _Rows:
  """One process's rows of an evaluation, padded to whole batches."""

  read: EvalRows
  indices: Int[np.ndarray, '_']

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, row: int) -> dict[str, Any]:
    index = int(self.indices[row])
    if index < 0:
      return {**self.read.blank(), 'mask': np.False_}
    return {**self.read(index), 'mask': np.True_}


def _close(box: list[grain.DatasetIterator]) -> None:
  box.pop().close()


def _prefetch(
  batches: grain.MapDataset, num_threads: int, num_workers: int
) -> grain.IterDataset:
  """Prepares whole batches ahead, one to a thread, and at least two."""
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=_ahead(num_threads)
  )
  dataset = batches.to_iter_dataset(options)
  if num_workers:
    # grain reads its flags to start workers, and outside an absl main, as in a
    # notebook, nobody has parsed them: the defaults will do.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers), worker_init_fn=_outlive_ctrl_c
    )
  return dataset


def _outlive_ctrl_c(index: int, count: int) -> None:
  """Leaves an interrupt of the terminal to the process that trains.

  Every process of the terminal gets it. A training saves its state first, and
  may need another batch until then; it stops its workers itself.
  """
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def _row_bytes(source: sources.Source, image_size: sizes.Size) -> int:
  """Size of a row of a batch, without its label."""
  if not isinstance(source, token_cache.TokenCache):
    return 3 * math.prod(sizes.pair(image_size))
  shapes = source.index.shapes
  return 4 * sum(math.prod(shapes[name]) for name in source.names)


def _ahead(num_threads: int) -> int:
  return max(2, num_threads)


def _local_batch(batch_size: int, process_count: int) -> int:
  if batch_size <= 0 or batch_size % process_count:
    raise errors.ConfigError(
      f'a batch of {batch_size} cannot be shared by {process_count} processes;'
      f' give a multiple of {process_count}'
    )
  return batch_size // process_count


def _stream(seed: int, purpose: int) -> int:
  # grain shuffles epoch e with seed + e: without mixing, a run with seed 1
  # would be that of seed 0 from its second epoch on.
  mixed = np.random.SeedSequence([seed, purpose]).generate_state(1)
  return int(mixed[0])
