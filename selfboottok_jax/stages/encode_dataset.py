"""Encodes a data set once, into a token cache that generators train on.

Threads decode images, the devices encode them, one thread writes. A batch is
started before the one ahead of it is fetched, so the devices never wait for the
disk.
"""

import collections
import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jaxtyping import Array, Float, Int, PyTree, UInt8

from selfboottok_jax import data, errors, files, pixels, sizes
from selfboottok_jax.data import cores, token_cache, token_cache_writer
from selfboottok_jax.evaluation import tables
from selfboottok_jax.stages import (
  checks,
  frozen_encoders,
  generator_stage,
  inputs,
)
from selfboottok_jax.training import processes, sharding

SHARD_IMAGES = 10_000
# Images of a device at a time. On a CPU, what stays in its caches is fastest.
_BATCH_OF_CPU, _BATCH_ELSEWHERE = 16, 128
# Batches that are started and not fetched: one is encoded while another is
# written, and a third would only take memory.
_UNDER_WAY = 2
# Batches of a timing of the encoder alone.
_TIMED = 8

# Started batches in their order, each with the number of its images to come.
_Started = collections.deque[futures.Future[int]]


def encode_dataset(
  config: ml_collections.ConfigDict,
  out: str | os.PathLike[str],
  *,
  splits: Sequence[str] = ('train', 'val'),
  shards: int | None = None,
  dtype: str = 'float16',
  batch_size: int | None = None,
  measure: bool = False,
  say: Callable[[str], None] = lambda text: None,
) -> None:
  """Writes, or continues to write, a token cache.

  With several processes each writes its share of the shards.

  Args:
    config: of a generator; names the tokenizer, the teacher and the images.
    out: folder of the cache, seen by all processes.
    splits: splits to encode.
    shards: files of each split; None is one per 10,000 images.
    dtype: type of the stored numbers, 'float16' or 'float32'.
    batch_size: images at a time in this process; None chooses by the device.
    measure: time the encoder alone too, and say how the writing compares.
    say: called with each line about the progress, on the first process.

  Raises:
    ConfigError: settings that cannot be used, or a folder of another cache.
    DataError: images that cannot be read, or a disk that is too small.
  """
  out = str(files.local_path('--out', out, token_cache.ELSEWHERE))
  _check(config, splits)
  with processes.all_or_none():
    sources = {s: inputs.open_data(config, s) for s in splits}
    tokenizer = generator_stage.load_tokenizer(config)
    encoders = frozen_encoders.from_config(
      config, tokenizer.image_encoder, tokenizer.patch_size
    )
  given = token_cache.Index(
    sizes.canonical(config.data.image_size),
    dtype,
    {name: leaf.shape for name, leaf in encoders.shapes.items()},
    sources[splits[0]].class_names,
    frozen_encoders.made_by(config, encoders, tokenizer.fingerprint),
    _splits(out, sources, shards),
    _are_apart(out),
  )
  # No process writes before all have seen that they may.
  with processes.all_or_none():
    index = token_cache.agree(out, given)
    pending = {
      s: token_cache_writer.pending_shards(out, index, s) for s in sources
    }
    room = token_cache_writer.check_room(out, index, pending)
  processes.check_same('caches to write', json.dumps(index.to_json()))
  is_first = jax.process_index() == 0
  share = {
    split: [
      s for s in missing if s % jax.process_count() == jax.process_index()
    ]
    for split, missing in pending.items()
  }
  encoder = None
  if any(share.values()):
    if batch_size is None:
      batch_size = _default_batch_size()
    encoder = CacheEncoder(encoders, index.dtype, batch_size)
  if is_first:
    token_cache.write_index(out, index)
    if room:
      say(f'writing {tables.size(room)} to {out}')
  processes.meet('index')
  shared_by = inputs.count_sharing_cores()
  rates = ''
  with processes.all_or_none():
    if encoder is not None:
      rates = _write_all(
        config, encoder, sources, out, index, share, shared_by, measure
      )
  if is_first:
    for split, written in pending.items():
      part = index.splits[split]
      codes = token_cache_writer.finish(out, index, split)
      records = part.count * index.records_of_image
      size = tables.size(records * index.record_bytes)
      say(
        f'{split}: {part.count:,} images, {len(written)} of {part.shards} '
        f'shards are new, {size}; codes have mean {codes.mean:.4f} and '
        f'deviation {codes.std:.4f}'
      )
    if rates:
      say(rates)


class CacheEncoder:
  """The program that encodes images and their mirror images for a cache.

  Attributes:
    batch_size: images at a time.
  """

  def __init__(
    self,
    encoders: frozen_encoders.FrozenEncoders,
    dtype: str,
    batch_size: int,
  ):
    """Places the parameters and compiles; ConfigError for an uneven batch."""
    # Every process encodes shards of its own, on a mesh of its own devices.
    self._mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(batch_size, self._mesh, '--batch_size')
    self.batch_size = batch_size
    everywhere = sharding.replicated(self._mesh)
    rows = sharding.batch_sharding(self._mesh)
    self._params = jax.device_put(encoders.params, everywhere)
    shape = (batch_size, *sizes.pair(encoders.tokenizer.image_size), 3)
    self._batch = jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows)

    def encode(params: PyTree, images: Array) -> dict[str, Array]:
      return encode_sides(encoders, params, images, dtype)

    self._program = (
      jax.jit(encode, in_shardings=(everywhere, rows), out_shardings=rows)
      .lower(self._params, self._batch)
      .compile()
    )

  def __call__(self, images: UInt8[np.ndarray, 'b h w 3']) -> dict[str, Array]:
    """Starts on a batch; returns each field [b, 2, ...] as it is stored."""
    return self._program(self._params, sharding.put_batch(images, self._mesh))

  def time(self, count: int) -> float:
    """Seconds for `count` batches that lie on the devices already."""
    noise = np.random.default_rng(0).integers(0, 256, self._batch.shape)
    resident = sharding.put_batch(noise.astype(np.uint8), self._mesh)
    began = time.monotonic()
    under_way: collections.deque[dict[str, Array]] = collections.deque()
    for _ in range(count):
      under_way.append(self._program(self._params, resident))
      if len(under_way) > _UNDER_WAY:
        jax.block_until_ready(under_way.popleft())
    jax.block_until_ready(list(under_way))
    return time.monotonic() - began


def encode_sides(
  encoders: frozen_encoders.FrozenEncoders,
  params: PyTree,
  images: UInt8[Array, 'b h w 3'],
  dtype: str,
) -> dict[str, Float[Array, 'b 2 ...']]:
  """Encodes images and their mirror images, and rounds to the stored type."""
  x = pixels.to_float(images)
  # Next to each other, so that both are on the device that has the image.
  sides = jnp.stack([x, x[:, :, ::-1]], axis=1)
  made = encoders(params, sides.reshape(-1, *x.shape[1:]))
  return {
    name: leaf.reshape(-1, token_cache.SIDES, *leaf.shape[1:]).astype(dtype)
    for name, leaf in made.items()
  }


def write_shards(
  encoder: CacheEncoder,
  source: data.Source,
  folder: str | os.PathLike[str],
  index: token_cache.Index,
  split: str,
  shards: Sequence[int],
  *,
  num_threads: int = 4,
  num_workers: int = 0,
) -> Generator[int, None, None]:
  """Writes some shards of a split, each whole before the next is begun.

  Every shard begins with a batch of its own, so its bytes depend neither on
  where an earlier command stopped nor on the number of processes.

  Args:
    encoder: encodes the images.
    source: the images of the split.
    folder: folder of the cache, which has its index already.
    index: index of the cache.
    split: name of the split.
    shards: one or more, in the order in which they are written.
    num_threads: decoding threads; -1 is by the cores of the machine.
    num_workers: decoding processes.

  Yields:
    The number of images of every batch, once it is written.

  Raises:
    DataError: images that cannot be read, or a shard that cannot be written.
  """
  batches = data.make_row_dataset(
    source,
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
  started: _Started = collections.deque()
  with contextlib.ExitStack() as stack:
    rows = iter(batches)
    # Stops the decoding threads, whatever ends the writing.
    stack.callback(getattr(rows, 'close', lambda: None))
    sink = stack.enter_context(_Sink(writers))
    for batch in rows:
      started.append(sink.put(encoder(batch['image']), batch))
      if len(started) > _UNDER_WAY:
        yield started.popleft().result()
    while started:
      yield started.popleft().result()


class _Sink:
  """A thread that fetches batches and writes them, in the order of the calls.

  An error in the thread is raised by the result of a call.
  """

  def __init__(self, writers: Iterator[token_cache_writer.ShardWriter]):
    self._writers = writers
    self._writer: token_cache_writer.ShardWriter | None = None
    self._pool = futures.ThreadPoolExecutor(1)

  def __enter__(self) -> '_Sink':
    return self

  def __exit__(self, *unused: object) -> None:
    self._pool.shutdown(cancel_futures=True)
    if self._writer is not None:
      self._writer.abort()

  def put(
    self, made: dict[str, Array], batch: dict[str, np.ndarray]
  ) -> futures.Future[int]:
    """Hands a batch over; the result is the number of its images."""
    return self._pool.submit(self._write, made, batch)

  def _write(self, made: dict[str, Array], batch: dict[str, np.ndarray]) -> int:
    if self._writer is None:
      self._writer = next(self._writers)
    count = int(batch['mask'].sum())
    fields = {name: np.asarray(leaf)[:count] for name, leaf in made.items()}
    self._writer.write(fields, batch['label'][:count])
    if not self._writer.left:
      self._writer.close()
      self._writer = None
    return count


def _check(config: ml_collections.ConfigDict, splits: Sequence[str]) -> None:
  """Raises ConfigError for what needs no data to be seen to be wrong."""
  if config.task != 'generator':
    raise errors.ConfigError(
      f'--config is of task {config.task}; wanted a preset of '
      'configs/generator.py, whose networks encode'
    )
  if config.data.cache:
    raise errors.ConfigError(
      f'data.cache={config.data.cache} is what trainings read; wanted images '
      'in data.path, and the new cache as --out'
    )
  if config.data.bad != 'stop':
    raise errors.ConfigError(
      f'data.bad={config.data.bad}, but a cache has a record of every image; '
      'make a data set without unreadable ones first, with launch.prepare '
      '--skip_bad'
    )
  if not splits:
    raise errors.ConfigError('--splits is empty; wanted train, val or both')
  checks.check(config)


def _splits(
  out: str, sources: Mapping[str, data.Source], shards: int | None
) -> dict[str, token_cache.Split]:
  """Size and origin of the splits; an existing cache keeps its shards."""
  there: Mapping[str, token_cache.Split] = {}
  if shards is None and pathlib.Path(out, token_cache.INDEX).exists():
    there = token_cache.read_index(out).splits
  splits = {}
  for name, source in sources.items():
    count = shards
    if count is None:
      # Each process gets some shards to write.
      usual = max(-(-len(source) // SHARD_IMAGES), jax.process_count())
      count = min(usual, len(source))
      if name in there:
        count = there[name].shards
    splits[name] = token_cache.Split(len(source), count, source.fingerprint)
  return splits


def _are_apart(out: str) -> bool:
  """True for a new cache; one that is there keeps its records."""
  if not pathlib.Path(out, token_cache.INDEX).exists():
    return True
  return token_cache.read_index(out).apart


def _write_all(
  config: ml_collections.ConfigDict,
  encoder: CacheEncoder,
  sources: Mapping[str, data.Source],
  out: str,
  index: token_cache.Index,
  share: Mapping[str, Sequence[int]],
  shared_by: int,
  measure: bool,
) -> str:
  """Writes this process's share; returns the sentence of `measure`, or ''.

  `shared_by` is the number of processes that share this one's cores.
  """
  alone = 0.0
  if measure:
    # Allocators get going outside the clocks.
    encoder.time(_TIMED)
    alone += encoder.time(_TIMED)
  images = sum(
    end - first
    for split, shards in share.items()
    for first, end in map(index.splits[split].bounds, shards)
  )
  began = time.monotonic()
  # tqdm reads None as "show the bar on a terminal only".
  silent = True if jax.process_index() else None
  with tqdm.tqdm(total=images, unit='image', disable=silent) as bar:
    for split in (split for split in share if share[split]):
      bar.set_description(split)
      num_threads, num_workers = cores.choose(
        sources[split],
        config.data.num_threads,
        config.data.num_workers,
        shared_by=shared_by,
      )
      counts = write_shards(
        encoder,
        sources[split],
        out,
        index,
        split,
        share[split],
        num_threads=num_threads,
        num_workers=num_workers,
      )
      with contextlib.closing(counts):
        for count in counts:
          bar.update(count)
  if not measure:
    return ''
  written = images / (time.monotonic() - began)
  # Before and after the writing: a drift of the machine counts by half.
  alone += encoder.time(_TIMED)
  rate = 2 * _TIMED * encoder.batch_size / alone
  return (
    f'written at {written:.1f} images/s, the encoder alone makes '
    f'{rate:.1f} images/s: {written / rate:.1%}'
  )


def _padded_rows(
  split: token_cache.Split, shards: Sequence[int], batch_size: int
) -> Int[np.ndarray, ' _']:
  """The images of shards, each shard padded to whole batches with -1."""
  parts = []
  for shard in shards:
    first, end = split.bounds(shard)
    padding = (0, -(end - first) % batch_size)
    parts.append(np.pad(np.arange(first, end), padding, constant_values=-1))
  return np.concatenate(parts)


def _default_batch_size() -> int:
  """Images at a time over all devices of this process."""
  platform = jax.local_devices()[0].platform
  of_device = _BATCH_OF_CPU if platform == 'cpu' else _BATCH_ELSEWHERE
  return jax.local_device_count() * of_device
