"""The images, or cached codes, that a configuration's stages read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from selfboottok_jax import data, errors, sizes
from selfboottok_jax.data import cores
from selfboottok_jax.stages import frozen_encoders
from selfboottok_jax.training import processes, sharding


def has_data(config: ml_collections.ConfigDict) -> bool:
  """True if the configuration says where images are."""
  given = config.data.path or config.data.get('cache', '')
  return bool(given) or config.data.source == 'procedural'


def open_data(config: ml_collections.ConfigDict, split: str) -> data.Source:
  """Opens the images of a split, or the token cache that `data.cache` names.

  Raises:
    ConfigError: random crops of a cache, or one of another image size.
    DataError: images or a cache that cannot be read, or a cache that lacks what
      the losses want.
  """
  if config.data.get('cache', ''):
    cached = data.open_token_cache(config.data.cache, split)
    cached.check_use(
      sizes.canonical(config.data.image_size),
      random_crop=config.data.random_crop,
    )
    names = frozen_encoders.wanted_fields(config)
    if split != 'train':
      # Targets are most of a record, and only training aligns.
      names = tuple(name for name in names if name != 'targets')
    return cached.select(names)
  return open_images(config, split)


def open_images(config: ml_collections.ConfigDict, split: str) -> data.Source:
  """Opens the images of a split, with or without a cache beside them."""
  return data.open_source(
    config.data.source,
    config.data.path,
    split,
    sizes.canonical(config.data.image_size),
    options=data.Options(config.data.exif, config.data.max_pixels),
    bad=config.data.bad,
  )


def open_val(
  config: ml_collections.ConfigDict, train: data.Source
) -> data.Source:
  """Opens the held-out images of a training's data; see `open_data`."""
  if isinstance(train, data.PictureSource):
    return train.of_split('val')
  return open_data(config, 'val')


def describe(
  config: ml_collections.ConfigDict, train: data.Source
) -> tuple[str, str, str]:
  """Three lines on the images that a training reads, for its log."""
  if isinstance(train, data.PictureSource):
    assert train.picture_set is not None
    return train.picture_set.describe()
  val, classes = open_data(config, 'val'), len(train.class_names)
  origin = 'built-in scenes' if config.data.source == 'procedural' else ''
  if config.data.get('cache', ''):
    origin = f'as {config.data.cache} was encoded'
  return (
    f'data: {len(train):,} train, {len(val):,} val images, {classes} '
    f'class{"es" * (classes != 1)} ({train!r})',
    f'split: {origin}',
    'skipped: nothing',
  )


def train_batches(
  config: ml_collections.ConfigDict,
  source: data.Source,
  *,
  start_step: int,
  on_skip: Callable[[int], None] | None = None,
) -> data.TrainBatches:
  """Augmented batches of this process's share, from `start_step` on.

  A cache yields the same order as its images, flips included. All processes
  must call this together. `on_skip` is called with the index of each image that
  cannot be read, where data.bad is 'skip'.
  """
  return data.make_train_dataset(
    source,
    batch_size=config.data.batch_size,
    image_size=sizes.canonical(config.data.image_size),
    seed=config.train.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    cores_shared_by=count_sharing_cores(),
    flip=config.data.flip,
    random_crop=config.data.random_crop,
    skip_bad=config.data.bad == 'skip',
    on_skip=on_skip,
  )


def count_sharing_cores() -> int:
  """Counts the processes that have this one's cores; all must call this."""
  return processes.count_alike(str(sorted(cores.core_ids())))


def eval_batches(
  config: ml_collections.ConfigDict,
  source: data.Source,
  mesh: Mesh,
  *,
  num_images: int | None = None,
  mixed: bool = False,
) -> data.EvalBatches:
  """Centre crops, or a cache's codes, of this process's share in a fixed order.

  Args:
    config: of a stage.
    source: what `open_data` returned.
    mesh: the devices that share a batch.
    num_images: at most so many, spread evenly over the source; None takes
      `evaluation.num_images`, and 0 is all.
    mixed: spread each batch over the source, which is in order of the classes.
  """
  sharding.check_batch_size(
    config.evaluation.batch_size, mesh, 'evaluation.batch_size'
  )
  if num_images is None:
    num_images = config.evaluation.num_images
  return data.make_eval_dataset(
    source,
    batch_size=config.evaluation.batch_size,
    image_size=sizes.canonical(config.data.image_size),
    num_images=num_images or None,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    skip_bad=config.data.bad == 'skip',
    mixed=mixed,
  )


def read_through(
  every: Sequence[data.EvalBatches],
) -> list[tuple[data.Source, int]]:
  """Reads batches, this process's share of each, and drops them.

  Returns:
    Source and index of the pictures that were skipped.

  Raises:
    DataError: a picture or a record cannot be read.
  """
  return [
    (batches.source, index)
    for batches in every
    for batch, indices in zip(batches, batches.indices, strict=True)
    for index in indices[(indices >= 0) & ~batch['mask']].tolist()
  ]


def check_image_size(
  config: ml_collections.ConfigDict, stage1: Mapping[str, Any]
) -> None:
  """Raises ConfigError unless images have the size of the tokenizer's.

  Args:
    config: of stage 2 or of a generator.
    stage1: configuration of the tokenizer's run.
  """
  trained = sizes.canonical(stage1['data']['image_size'])
  given = sizes.canonical(config.data.image_size)
  if given != trained:
    raise errors.ConfigError(
      f'data.image_size={given}, but tokenizer='
      f'{config.tokenizer or config.assumed.tokenizer} is of {trained}; set '
      f'--config.data.image_size={sizes.as_flag(trained)}'
    )
