"""Images through an encoder into the shards of a token cache.

Threads decode, the devices encode, a thread writes. A batch is started before
the one ahead of it is fetched, so that the devices never wait for the disk.
"""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np
from jaxtyping import Array

from selfboottok_jax import data
from selfboottok_jax.data import token_cache, token_cache_writer
from selfboottok_jax.stages import encode_rates
from selfboottok_jax.stages import encoder as encoder_lib


def write_shards(
  encoder: encoder_lib.Encoder,
  source: data.Source,
  folder: str,
  index: token_cache.Index,
  split: str,
  shards: Sequence[int],
  *,
  rates: encode_rates.Rates | None = None,
  num_threads: int = 4,
  num_workers: int = 0,
) -> Iterator[int]:
  """Writes some shards of a split, each whole before the next is begun.

  Every shard begins with a batch of its own, so that its bytes depend neither
  on where an earlier command stopped nor on the number of processes.

  Args:
    encoder: of the images.
    source: the images of the split.
    folder: of the cache, where its index is already.
    index: of the cache.
    split: its name.
    shards: one or more, in the order in which they are written.
    rates: takes turns with the writing, if given.
    num_threads: decoding threads.
    num_workers: decoding processes.

  Yields:
    The number of images of every batch, once it is written.

  Raises:
    DataError: images that cannot be read, or a shard that cannot be written.
  """
  batches = data.make_row_dataset(
    rates.gated(source) if rates else source,
    _padded_rows(index.splits[split], shards, encoder.batch_size),
    batch_size=encoder.batch_size,
    image_size=index.image_size,
    num_threads=num_threads,
    num_workers=num_workers,
  )
  writers = (
    token_cache_writer.ShardWriter(folder, index, split, shard)
    for shard in shards
  )
  under_way = collections.deque()

  def wait(most):
    while len(under_way) > most:
      yield under_way.popleft().result()

  with contextlib.closing(iter(batches)) as rows, _Sink(writers) as sink:
    for batch in rows:
      under_way.append(sink.put(encoder(batch['image']), batch))
      yield from wait(encoder_lib.UNDER_WAY)
      if rates and rates.due():
        yield from wait(0)
        rates.take()
    yield from wait(0)


def _padded_rows(
  told: token_cache.Split, shards: Sequence[int], batch_size: int
) -> np.ndarray:
  """The images of shards, each shard padded to whole batches with -1."""
  parts = []
  for shard in shards:
    first, end = told.bounds(shard)
    padding = (0, -(end - first) % batch_size)
    parts.append(np.pad(np.arange(first, end), padding, constant_values=-1))
  return np.concatenate(parts)


class _Sink:
  """A thread that fetches batches and writes them, in the order of the calls.

  What goes wrong in it is raised by the result of a call.
  """

  def __init__(self, writers: Iterator[token_cache_writer.ShardWriter]):
    self._writers, self._writer = writers, None
    self._pool = futures.ThreadPoolExecutor(1)

  def __enter__(self) -> '_Sink':
    return self

  def __exit__(self, *unused) -> None:
    self._pool.shutdown(cancel_futures=True)
    if self._writer is not None:
      self._writer.abort()

  def put(
    self, made: dict[str, Array], batch: dict[str, np.ndarray]
  ) -> futures.Future[int]:
    """Hands a batch over; the result is the number of its images."""
    return self._pool.submit(self._write, made, batch)

  def _write(self, made, batch) -> int:
    if self._writer is None:
      self._writer = next(self._writers)
    count = int(batch['mask'].sum())
    fields = {name: np.asarray(leaf)[:count] for name, leaf in made.items()}
    self._writer.write(fields, batch['label'][:count])
    if not self._writer.left:
      self._writer.close()
      self._writer = None
    return count
