"""The task that trains a generator."""

from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import data, errors, inference, pretrained
from selfboottok_jax.models import sit
from selfboottok_jax.pretrained import autoencoders
from selfboottok_jax.stages import (
  encoding_builder,
  frozen_encoders,
  generator,
  generator_evaluators,
  inputs,
)
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import state as state_lib


def build_generator(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> inputs.Built:
  """A generator of the codes of `config.tokenizer`."""
  check_classes(train, config)
  tokenizer = load_tokenizer(config)
  cached = bool(config.data.cache)
  encoder = encoding_builder.build_encoding(
    config, tokenizer.codec, tokenizer.patch_size, abstract=cached
  )
  if cached:
    train.check(
      tokenizer.fingerprint,
      config.networks.teacher,
      config.model.dtype,
      encoder,
    )
  task = make_generator_task(
    config, encoder, len(train.class_names), cached=cached
  )

  def start(state):
    latents = None
    if config.init_from:
      state, latents = _fine_tune(
        config, task.model, state, tokenizer.fingerprint
      )
    if latents is None:
      latents = _measure(config, task, train)
    placed = jax.tree.map(
      lambda new, old: jax.device_put(np.asarray(new), old.sharding),
      dict(latents),
      state.stats['latents'],
    )
    return state.replace(stats={**state.stats, 'latents': placed})

  val, distances = inputs.open_data(config, 'val'), []
  batches = inputs.eval_batches(config, val, mesh)
  if config.evaluation.num_samples:
    distances.append(_distance(config, task, tokenizer, val))

  return inputs.assemble(
    config,
    task,
    train,
    start=start,
    evaluators=lambda frozen: [
      generator_evaluators.Velocity(task, batches, mesh, frozen),
      *distances,
    ],
    model_fields=model_fields(config, encoder),
    tokenizer_fingerprint=tokenizer.fingerprint,
  )


def load_tokenizer(
  config: ml_collections.ConfigDict,
) -> inference.ImageTokenizer | inference.ImageAutoencoder:
  """The tokenizer that `config.tokenizer` names, for images of the data's size.

  Raises:
    ConfigError: none is named, or it is of another size.
  """
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a tokenizer run, as in '
      '--config.tokenizer=runs/tok'
    )
  if autoencoders.is_autoencoder(config.tokenizer):
    return inference.load_autoencoder(config.tokenizer, config.data.image_size)
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  inputs.check_image_size(config, run.config)
  return inference.tokenizer_of(run)


def check_classes(
  source: data.Source, config: ml_collections.ConfigDict
) -> None:
  """DataError for images without classes."""
  if not source.class_names:
    raise errors.DataError(
      f'{source!r} has no class folders; a generator wanted '
      'PHOTOS/CLASS/*.jpg, or PHOTOS/train/CLASS/*.jpg'
    )


def make_generator_task(
  config: ml_collections.ConfigDict,
  encoder: frozen_encoders.Encoding,
  num_classes: int,
  *,
  cached: bool = False,
) -> generator.GeneratorTask:
  """A generator without data; the encoding's parameters may be shapes."""
  codec = encoder.codec
  model = sit.SiT(
    num_tokens=codec.num_tokens,
    token_dim=codec.token_dim,
    num_classes=num_classes,
    **model_fields(config, encoder),
  )
  _check_widths(model)
  goal = generator.Objective(**config.loss)
  return generator.GeneratorTask(model, goal, encoder, cached=cached)


def model_fields(
  config: ml_collections.ConfigDict, encoder: frozen_encoders.Encoding
) -> dict[str, Any]:
  """The model's fields, with those that tokenizer and teacher decide."""
  shapes = encoder.shapes
  cls_dim = shapes['cls'].shape[-1] if 'cls' in shapes else 0
  align_dim = 0
  if 'targets' in shapes:
    align_dim = shapes['targets'].shape[-1]
  elif encoder.align_mode == 'cls_only':
    align_dim = cls_dim
  return {
    **config.model.to_dict(),
    'positions': encoder.codec.positions,
    'cls_dim': cls_dim,
    'align_dim': align_dim,
  }


def _check_widths(model: sit.SiT) -> None:
  """ConfigError for a width that cannot be shared."""
  heads = f'model.heads={model.heads}'
  if model.width % model.heads:
    raise errors.ConfigError(
      f'model.width={model.width} does not divide by {heads}; change one of '
      'the two'
    )
  parts = 2 if model.positions == '1d' else 4
  of_head = model.width // model.heads
  if model.rope and of_head % parts:
    raise errors.ConfigError(
      f'model.rope=True with heads of {of_head} (model.width={model.width}, '
      f'{heads}); wanted heads of a multiple of {parts}'
    )
  if model.positions == '2d' and model.width % 4:
    raise errors.ConfigError(
      f'model.width={model.width}; wanted a multiple of 4, for the 2D positions'
    )


def _fine_tune(
  config: ml_collections.ConfigDict,
  model: sit.SiT,
  state: state_lib.TrainState,
  fingerprint: str,
) -> tuple[state_lib.TrainState, PyTree | None]:
  """A state from another run, and its statistics if they are of our codes."""
  source = checkpointing.read_run(
    config.init_from, what='init_from', task='generator'
  )
  state = inputs.fine_tune(
    state,
    'generator',
    generator.cut_blocks(source.ema['generator'], model),
    config.init_from,
    may_differ=generator.MAY_START_FRESH,
  )
  kind = config.loss.latent_statistics
  if (
    source.config['loss']['latent_statistics'] == kind
    and source.meta['tokenizer_fingerprint'] == fingerprint
  ):
    return state, source.stats['latents']
  return state, None


def _measure(config, task, train):
  """Statistics of the codes of centre crops of the training images."""
  kind, count = task.objective.latent_statistics, len(train)
  if not task.objective.statistics_images and isinstance(
    train, data.LatentSource
  ):
    # Of all images a cache knows them.
    return _as_measured(train.statistics, kind, task.model.token_dim)
  count = task.objective.statistics_images or count
  batches = data.make_eval_dataset(
    train,
    batch_size=config.data.batch_size,
    image_size=config.data.image_size,
    num_images=min(count, len(train)),
    num_threads=config.data.num_threads,
  )
  codec = task.encoding.codec
  encode = jax.jit(codec.encode)

  def codes(batch):
    if 'codes' in batch:
      return batch['codes']
    images = batch['image'].astype(np.float32) / np.float32(127.5) - 1
    return np.asarray(encode(codec.params, images))

  return generator.measure_latents(
    (codes(batch)[batch['mask']] for batch in batches), kind
  )


def _as_measured(statistics: data.Statistics, kind: str, width: int):
  """What `generator.measure_latents` would say of all codes of a cache."""
  mean, std = statistics.channel_mean, statistics.channel_std
  if kind == 'scalar':
    mean, std = [statistics.mean] * width, [statistics.std] * width
  return {
    'mean': np.asarray(mean, np.float32),
    'std': np.maximum(np.asarray(std, np.float32), np.float32(1e-6)),
  }


def _distance(config, task, tokenizer, val):
  """What measures samples while a generator trains."""
  if config.data.cache and not config.data.path:
    raise errors.ConfigError(
      f'evaluation.num_samples={config.evaluation.num_samples} compares '
      'samples with images, and data.path is empty; name it beside data.cache, '
      'or set --config.evaluation.num_samples=0'
    )
  source = data.open_source(
    config.data.source, config.data.path, 'val', config.data.image_size
  )
  if source.fingerprint != val.fingerprint:
    raise errors.ConfigError(
      f'data.path={config.data.path} has other images than those of data.cache='
      f'{config.data.cache}; wanted the ones that were encoded'
    )
  images = data.make_eval_dataset(
    source,
    batch_size=config.evaluation.batch_size,
    image_size=config.data.image_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
  )
  return generator_evaluators.SampleDistance(
    task,
    tokenizer,
    inference.Sampling(**config.sampling),
    load_frechet(config.networks.frechet, tokenizer.patch_size),
    images,
    num_samples=config.evaluation.num_samples,
    batch_size=config.evaluation.batch_size,
    class_names=val.class_names,
  )


def load_frechet(spec: str, patch_size: int) -> pretrained.FeatureNetwork:
  """The features of a Frechet distance.

  Those without weights are taken on the tokenizer's patches.
  """
  bare = spec in pretrained.BUILTIN
  return pretrained.load_network(
    spec, **({'patch_size': patch_size} if bare else {})
  )
