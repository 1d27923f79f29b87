"""Builds training and evaluation batches from pictures or token caches.

Training batches are endless, shuffled and augmented; evaluation batches go
once over a source in a fixed order. Several processes share each batch, and
the rows depend on seed and step alone, not on the number of processes.
"""

import contextlib
import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from selfboottok_jax import errors, sizes
from selfboottok_jax.data import (
  cores,
  picture_set,
  pictures,
  sources,
  token_cache,
  transforms,
)
from selfboottok_jax.data import workers as workers_lib

Row = dict[str, Any]
# More that cannot be read one after another are no accident.
_MOST_BAD_IN_A_ROW = 100


@runtime_checkable
class Prepared(Protocol):
  """An iterator over batches that others prepare until it is closed."""

  def __iter__(self) -> Iterator[Row]:
    """Returns itself."""

  def __next__(self) -> Row:
    """The next batch."""

  def close(self) -> None:
    """Stops what prepares them."""


def read(source: sources.Source, index: int) -> Row:
  """Reads a picture, not as an array where that would be one more copy."""
  if isinstance(source, picture_set.PictureSource):
    return source.picture(index)
  return source[index]


@dataclasses.dataclass(frozen=True)
class TrainPictures:
  """Reads pictures and augments them at random."""

  source: sources.Source
  transform: transforms.TrainTransform
  skip_bad: bool = False

  def __call__(self, index: int, rng: np.random.Generator) -> Row:
    """Reads and augments one.

    With `skip_bad` the next picture that can be read takes the place of one
    that cannot, and 'skipped' is the index of the latter, or -1: which pictures
    a step has is still decided by seed and step.
    """
    if not self.skip_bad:
      return self.transform(read(self.source, index), rng)
    for tried in range(_MOST_BAD_IN_A_ROW):
      try:
        element = read(self.source, (index + tried) % len(self.source))
      except pictures.PictureError as error:
        last = error
      else:
        skipped = np.int64(index if tried else -1)
        return {**self.transform(element, rng), 'skipped': skipped}
    raise errors.DataError(
      f'{_MOST_BAD_IN_A_ROW} images in a row cannot be read, the last: {last}'
    )


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
  skip_bad: bool = False

  def __call__(self, index: int) -> Row | None:
    """Reads and crops one; None for a picture that is skipped."""
    try:
      element = read(self.source, index)
    except pictures.PictureError:
      if not self.skip_bad:
        raise
      return None
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
  skip_bad: bool = False,
) -> Callable[[int, np.random.Generator], Row]:
  """Returns the reader of training rows; ConfigError for unfit settings."""
  if isinstance(source, token_cache.TokenCache):
    source.check_use(image_size, random_crop=random_crop)
    return TrainCodes(source, flip)
  scale = source.max_scale if max_scale is None else max_scale
  return TrainPictures(
    source,
    transforms.TrainTransform(image_size, scale, flip, random_crop),
    skip_bad,
  )


def eval_rows(
  source: sources.Source, image_size: sizes.Size, *, skip_bad: bool = False
) -> EvalRows:
  """Returns the reader of evaluation rows; ConfigError for a wrong size."""
  if isinstance(source, token_cache.TokenCache):
    source.check_use(image_size, random_crop=False)
    return EvalCodes(source)
  return EvalPictures(source, image_size, skip_bad)


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
  skip_bad: bool = False,
  on_skip: Callable[[int], None] | None = None,
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
    skip_bad: see `TrainPictures`.
    on_skip: called with the index of each picture that was skipped, once.

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
    source,
    image_size,
    max_scale=max_scale,
    flip=flip,
    random_crop=random_crop,
    skip_bad=skip_bad,
  )
  order = (
    grain.MapDataset.range(len(source))
    .shuffle(seed=_stream(seed, _SHUFFLE))
    .repeat()
    .batch(local)
  )
  # Processes are split after the shuffle, so that their number does not
  # change the global batch.
  share = _Share(
    order,
    draw,
    _stream(seed, _AUGMENT),
    start_step,
    batch_size,
    local,
    process_index,
  )
  batches = grain.MapDataset.source(share)
  batch_bytes = local * _row_bytes(source, image_size)
  threads, workers = cores.choose(
    source,
    num_threads,
    num_workers,
    shared_by=cores_shared_by,
    batch_bytes=batch_bytes,
  )
  # Each worker prepares as many as this process would without any, and those
  # that wait in shared memory.
  ahead = _ahead(threads) + 1
  if workers:
    ahead = (ahead + workers_lib.SLOTS) * workers
  return TrainBatches(
    _prefetch(batches, threads, workers, batch_bytes), ahead, on_skip
  )


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
  skip_bad: bool = False,
  mixed: bool = False,
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
    skip_bad: whether a picture that cannot be read is padding.
    mixed: whether each batch is spread over the source, too.

  Raises:
    ConfigError: a batch size that processes cannot share; a cache of another
      image size.
  """
  count = len(source) if num_images is None else min(num_images, len(source))
  places = np.arange(count)
  if mixed and count:
    every = -(-count // batch_size)
    places = np.concatenate([places[i::every] for i in range(every)])
  indices = places * len(source) // max(count, 1)
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
    skip_bad=skip_bad,
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
  skip_bad: bool = False,
) -> 'EvalBatches':
  """Makes one pass over chosen rows; else as `make_eval_dataset`.

  `indices` are of the source, in the order wanted; -1 is padding.
  """
  local = _local_batch(batch_size, process_count)
  # Every process needs the same number of batches: they meet in each one.
  padding = -len(indices) % batch_size
  padded = np.pad(indices, (0, padding), constant_values=-1)
  share = padded.reshape(-1, process_count, local)[:, process_index].ravel()
  rows = _Rows(eval_rows(source, image_size, skip_bad=skip_bad), share, local)
  if num_workers == cores.BY_CORES:
    num_workers = 0
  num_threads, num_workers = cores.choose(
    source, num_threads, num_workers, shared_by=cores_shared_by
  )
  batch_bytes = local * _row_bytes(source, image_size)
  return EvalBatches(rows, indices, num_threads, num_workers, batch_bytes)


class TrainBatches:
  """Endless batches; owns the threads and workers that prepare them.

  They end with `close()`, with the object, or with the process.

  Attributes:
    ahead: the most batches that are prepared before they are asked for.
  """

  def __init__(
    self,
    iterator: Prepared,
    ahead: int,
    on_skip: Callable[[int], None] | None = None,
  ):
    """Takes over an iterator, which nobody else may hold."""
    self.ahead = ahead
    self._on_skip, self._skipped = on_skip, set[int]()
    # Held in a box that the finaliser empties.
    self._box = [iterator]
    self._finalizer = weakref.finalize(self, _close, self._box)

  def __iter__(self) -> 'TrainBatches':
    """Returns itself."""
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next step's batch; ends once closed."""
    if not self._box:
      raise StopIteration
    batch = next(self._box[0])
    # Told here, as pictures are read by other threads and processes.
    for index in batch.pop('skipped', np.empty(0, np.int64)).tolist():
      if index >= 0 and index not in self._skipped:
        self._skipped.add(index)
        if self._on_skip:
          self._on_skip(index)
    return batch

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
    order: the pictures in the batches of all processes together, by index in
      the source; -1 is padding.
  """

  rows: '_Rows'
  order: Int[np.ndarray, '_']
  num_threads: int
  num_workers: int
  batch_bytes: int

  @property
  def count(self) -> int:
    """Pictures in the batches of all processes together."""
    return int(np.sum(self.order >= 0))

  @property
  def source(self) -> sources.Source:
    """The source that the batches are read from."""
    return self.rows.read.source

  @property
  def indices(self) -> Int[np.ndarray, 'batches b']:
    """The pictures of each batch, by index in the source; -1 is padding."""
    return self.rows.indices.reshape(len(self), -1)

  def __len__(self) -> int:
    """Number of batches."""
    return len(self.rows)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Reads the batches; threads end when the reader stops."""
    batches = grain.MapDataset.source(self.rows)
    # A worker without a batch would start for nothing.
    workers = min(self.num_workers, len(self))
    iterator = _prefetch(batches, self.num_threads, workers, self.batch_bytes)
    with contextlib.closing(iterator):
      yield from iterator


@dataclasses.dataclass(frozen=True)
class _Share:
  """One process's batches of the endless stream, from a step on.

  A whole batch is one element of grain's, whose bookkeeping for an element
  takes as long as a small picture. `order` has the indices of shares: those of
  all processes for one step, then those for the next.
  """

  order: grain.MapDataset
  draw: Callable[[int, np.random.Generator], Row]
  seed: int
  start_step: int
  batch_size: int
  local: int
  process_index: int

  def __len__(self) -> int:
    return sys.maxsize // self.batch_size - self.start_step

  def __getitem__(self, index: int) -> Row:
    shares = self.batch_size // self.local
    share = (self.start_step + index) * shares + self.process_index
    first = share * self.local
    philox = np.random.Philox(self.seed)
    rng, state = np.random.Generator(philox), philox.state
    # A thread has its own: setting the state is faster than a new one.
    rows = []
    for place, picture in enumerate(self.order[share].tolist(), first):
      # What a picture draws depends on its place in the stream alone.
      state['state']['counter'] = np.array([0, 0, 0, place], np.uint64)
      philox.state = state
      rows.append(self.draw(picture, rng))
    return stack(rows)


@dataclasses.dataclass(frozen=True)
class _Rows:
  """One process's batches of an evaluation, of the rows with these indices.

  Pictures that are skipped are padding too.
  """

  read: EvalRows
  indices: Int[np.ndarray, '_']
  local: int

  def __len__(self) -> int:
    return len(self.indices) // self.local

  def __getitem__(self, batch: int) -> Row:
    first = batch * self.local
    return stack(
      [self._row(i) for i in self.indices[first : first + self.local].tolist()]
    )

  def _row(self, index: int) -> Row:
    if index < 0:
      return {**self.read.blank(), 'mask': np.False_}
    element = self.read(index)
    if element is None:
      return {**self.read.blank(), 'mask': np.False_}
    return {**element, 'mask': np.True_}


def stack(rows: Sequence[Row]) -> Row:
  """Rows as one batch."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _close(box: list[Prepared]) -> None:
  box.pop().close()


def _prefetch(
  batches: grain.MapDataset,
  num_threads: int,
  num_workers: int,
  batch_bytes: int,
) -> Prepared:
  """Prepares whole batches ahead, one to a thread, and at least two."""
  prepare = _Prepare(batches, num_threads, max(num_workers, 1))
  if not num_workers:
    return prepare(0)
  return workers_lib.Workers(
    prepare, count=num_workers, batch_bytes=batch_bytes
  )


@dataclasses.dataclass(frozen=True)
class _Prepare:
  """Prepares one of every few batches, in threads: those of a worker."""

  batches: grain.MapDataset
  num_threads: int
  every: int

  def __call__(self, first: int) -> grain.DatasetIterator:
    """Iterates over the batches first, first + every, ..."""
    options = grain.ReadOptions(
      num_threads=self.num_threads,
      prefetch_buffer_size=_ahead(self.num_threads),
    )
    mine = self.batches
    if self.every > 1:
      mine = mine.slice(slice(first, None, self.every))
    return iter(mine.to_iter_dataset(options))


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
