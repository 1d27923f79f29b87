"""Encodes a data set once, so that generators learn from codes, not images.

  python -m launch.encode --config=configs/generator.py:photos64 \
    --config.tokenizer=runs/tok --config.data.path=PHOTOS --out=cache

A training takes it as --config.data.cache=cache. A command that was stopped
continues when it is given again.
"""

import contextlib
import json
import os
import pathlib

import jax
import ml_collections
import tqdm

from launch import cli
from selfboottok_jax import data, errors, files
from selfboottok_jax.data import token_cache, token_cache_writer
from selfboottok_jax.stages import (
  checks,
  encode_rates,
  encode_shards,
  frozen_encoders,
  generator_stage,
  inputs,
)
from selfboottok_jax.stages import encoder as encoder_lib
from selfboottok_jax.training import processes

FLAGS = cli.Flags()
_CONFIG = FLAGS.config()
_OUT = FLAGS.string('out', '', 'Folder of the cache.')
_SPLITS = FLAGS.strings('splits', ['train', 'val'], 'Splits to encode.')
_SHARDS = FLAGS.optional_integer(
  'shards', 'Files of each split; one per 10,000 images by default.'
)
_DTYPE = FLAGS.string('dtype', 'float16', 'float16 or float32.')
_BATCH_SIZE = FLAGS.optional_integer(
  'batch_size', 'Images at a time in each process.'
)
_MULTIHOST = FLAGS.switch(
  'multihost', False, 'Join the other processes of a pod or a cluster first.'
)
_MEASURE = FLAGS.switch(
  'measure', False, 'Time the encoder alone on the way, and compare.'
)

SHARD_IMAGES = 10_000
# Batches of a device. On a CPU, what stays in its caches is fastest.
_ON_CPU, _ELSE = 16, 128


def main() -> None:
  """Encodes what the flags say."""
  config = _CONFIG.value
  cli.require(out=_OUT.value)
  out = os.path.expanduser(_OUT.value)
  _check(config)
  files.check_folder('out', out)
  cli.start_jax(multihost=_MULTIHOST.value)
  checks.check(config)
  with processes.all_or_none():
    sources = {s: inputs.open_data(config, s) for s in _SPLITS.value}
    for source in sources.values():
      generator_stage.check_classes(source)
  tokenizer = generator_stage.load_tokenizer(config)
  encoding = frozen_encoders.from_config(
    config, tokenizer.image_encoder, tokenizer.patch_size
  )
  given = token_cache.Index(
    config.data.image_size,
    _DTYPE.value,
    {name: leaf.shape for name, leaf in encoding.shapes.items()},
    sources[_SPLITS.value[0]].class_names,
    frozen_encoders.provenance(config, encoding, tokenizer.fingerprint),
    _splits(out, sources),
  )
  # Nothing is written before all have seen that they may.
  with processes.all_or_none():
    index = token_cache.agree(out, given)
    pending = {
      s: token_cache_writer.pending_shards(out, index, s) for s in sources
    }
    room = token_cache_writer.check_room(out, index, pending)
  processes.check_same('caches to write', json.dumps(index.to_json()))
  share = _share(pending)
  encoder = None
  if any(share.values()):
    encoder = encoder_lib.Encoder(encoding, index.dtype, _batch_size())
  if jax.process_index() == 0:
    token_cache.write_index(out, index)
    if room:
      cli.say(f'writing {_size(room)} to {out}')
  processes.meet('index')
  with processes.all_or_none():
    rates = _encode(config, encoder, sources, out, index, share)
  if jax.process_index() == 0:
    _finish(out, index, pending)
    if rates:
      cli.say(rates.summary())


def _check(config: ml_collections.ConfigDict) -> None:
  """ConfigError for what needs no data to be seen to be wrong."""
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
  if not _SPLITS.value:
    raise errors.ConfigError('--splits is empty; wanted train, val or both')
  if _MEASURE.value and config.data.num_workers:
    raise errors.ConfigError(
      f'--measure cannot hold data.num_workers={config.data.num_workers} while '
      'it times; wanted 0'
    )


def _splits(
  out: str, sources: dict[str, data.Source]
) -> dict[str, token_cache.Split]:
  """What the index tells of the splits; shards are those that are there."""
  there = {}
  if _SHARDS.value is None and pathlib.Path(out, token_cache.INDEX).exists():
    there = token_cache.read_index(out).splits
  splits = {}
  for name, source in sources.items():
    shards = _SHARDS.value
    if shards is None:
      # Each process has some to write.
      usual = max(-(-len(source) // SHARD_IMAGES), jax.process_count())
      shards = min(usual, len(source))
      if name in there:
        shards = there[name].shards
    splits[name] = token_cache.Split(len(source), shards, source.fingerprint)
  return splits


def _share(pending: dict[str, list[int]]) -> dict[str, list[int]]:
  """What this process writes of the shards that are pending."""
  process, count = jax.process_index(), jax.process_count()
  return {
    split: [shard for shard in shards if shard % count == process]
    for split, shards in pending.items()
  }


def _encode(
  config: ml_collections.ConfigDict,
  encoder: encoder_lib.Encoder | None,
  sources: dict[str, data.Source],
  out: str,
  index: token_cache.Index,
  share: dict[str, list[int]],
) -> encode_rates.Rates | None:
  """Writes a share of the shards; without one there is no encoder."""
  if encoder is None:
    return None
  rates = None
  if _MEASURE.value:
    # Allocators get going outside the clocks.
    encoder.time(encode_rates.TIMED)
    rates = encode_rates.Rates(encoder.time, encoder.batch_size)
  images = sum(
    end - first
    for split, shards in share.items()
    for first, end in map(index.splits[split].bounds, shards)
  )
  # None is silent unless somebody looks.
  silent = True if jax.process_index() else None
  with tqdm.tqdm(total=images, unit='image', disable=silent) as bar:
    for split in (split for split in share if share[split]):
      bar.set_description(split)
      counts = encode_shards.write_shards(
        encoder,
        sources[split],
        out,
        index,
        split,
        share[split],
        rates=rates,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
      )
      # Whatever stops it, its threads end here.
      with contextlib.closing(counts):
        for count in counts:
          bar.update(count)
          if rates:
            rates.add(count)
  return rates


def _batch_size() -> int:
  """Of a process, over all of its devices."""
  if _BATCH_SIZE.value is not None:
    return _BATCH_SIZE.value
  platform = jax.local_devices()[0].platform
  return jax.local_device_count() * (_ON_CPU if platform == 'cpu' else _ELSE)


def _finish(
  out: str, index: token_cache.Index, pending: dict[str, list[int]]
) -> None:
  """Declares the splits complete, and says what there is."""
  for split, written in pending.items():
    told, codes = (
      index.splits[split],
      token_cache_writer.finish(out, index, split),
    )
    cli.say(
      f'{split}: {told.count:,} images, {len(written)} of {told.shards} shards '
      f'are new, {_size(told.count * index.record_bytes)}; codes have mean '
      f'{codes.mean:.4f} and deviation {codes.std:.4f}'
    )


def _size(count: int) -> str:
  """Bytes, for people."""
  return f'{count / 1e9:,.1f} GB' if count >= 1e9 else f'{count / 1e6:,.1f} MB'


if __name__ == '__main__':
  cli.run(main, FLAGS)
