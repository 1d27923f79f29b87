"""The generator's stage: how it is built, starts and is measured."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Int, PyTree

from selfboottok_jax import (
  data,
  errors,
  inference,
  pixels,
  pretrained,
  sizes,
)
from selfboottok_jax.data import token_cache
from selfboottok_jax.evaluation import evaluate, frechet, scores
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import tokenizer as inference_tokenizer
from selfboottok_jax.models import sit
from selfboottok_jax.pretrained import autoencoders
from selfboottok_jax.stages import (
  frozen_encoders,
  generator,
  initialization,
  inputs,
)
from selfboottok_jax.training import checkpointing, loop, sharding
from selfboottok_jax.training import state as state_lib

# The class of images that have none.
ONLY_CLASS = 'images'
# Mean and deviation of the codes, [e] each.
CodeStatistics = Mapping[str, Float[Array, ' e'] | Float[np.ndarray, ' e']]


class GeneratorStage:
  """A generator of the codes of another run's tokenizer.

  Attributes are those of `stages.Stage`.
  """

  shown: dict[str, str] = {
    'velocity': 'loss/velocity',
    'val velocity': 'val/velocity_loss',
  }

  def __init__(
    self, config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
  ):
    """Loads tokenizer and teacher, and opens the held-out images."""
    self._config, self._train = config, train
    tokenizer = load_tokenizer(config)
    self._fingerprint = tokenizer.fingerprint
    cached = bool(config.data.cache)
    # A cache has the teacher's outputs already, so its weights stay unread.
    encoders = frozen_encoders.from_config(
      config, tokenizer.image_encoder, tokenizer.patch_size, abstract=cached
    )
    if cached:
      assert isinstance(train, data.TokenCache)
      train.check(
        tokenizer.fingerprint,
        config.networks.teacher,
        config.model.dtype,
        encoders.shapes,
        encoders.align_mode,
      )
    names = class_names(train)
    self.task = make_generator_task(config, encoders, len(names), cached=cached)
    self.model_fields = model_fields(config, encoders)
    self.meta: dict[str, Any] = {
      'class_names': list(names),
      'tokenizer_fingerprint': tokenizer.fingerprint,
    }
    # All that may fail is opened here, before anything is written.
    self._mesh, val = mesh, inputs.open_val(config, train)
    self._batches = inputs.eval_batches(config, val, mesh)
    self.held_out = [self._batches]
    self._distances: list[loop.Evaluator] = []
    if config.evaluation.num_samples:
      images, distance = _sample_distance(
        config, self.task, tokenizer, val, mesh
      )
      self._distances.append(distance)
      # All pictures: also those of `_batches`, unless these are a cache's.
      self.held_out = [images, *self.held_out * cached]

  def start(self, fresh: state_lib.TrainState) -> state_lib.TrainState:
    """Starts fresh or from another run, with the statistics of the codes.

    They are measured, unless the other run has them for the same codes.
    """
    state, statistics = fresh, None
    if self._config.init_from:
      state, statistics = self._fine_tune(fresh)
    if statistics is None:
      statistics = code_statistics(
        self._config, self.task, self._train, self._mesh
      )
    key = generator.CODE_STATISTICS
    # Through the host: an array of one device cannot move to a mesh of several
    # hosts.
    placed = jax.tree.map(
      lambda new, old: jax.device_put(np.asarray(new), old.sharding),
      dict(statistics),
      state.stats[key],
    )
    return dataclasses.replace(state, stats={**state.stats, key: placed})

  def evaluators(self, frozen: PyTree) -> list[loop.Evaluator]:
    """Velocity losses on held-out images and, if asked for, FD of samples."""
    velocity = Velocity(self.task, self._batches, self._mesh, frozen)
    return [velocity, *self._distances]

  def _fine_tune(
    self, fresh: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, CodeStatistics | None]:
    """A state from another run, and its statistics if they fit our codes."""
    config = self._config
    run = checkpointing.read_run(
      config.init_from, what='init_from', task='generator'
    )
    state = initialization.fine_tune(
      fresh,
      generator.GROUP,
      generator.cut_blocks(run.ema[generator.GROUP], self.task.model),
      config.init_from,
      may_differ=generator.MAY_START_FRESH,
    )
    kind = config.loss.latent_statistics
    same_kind = run.config['loss']['latent_statistics'] == kind
    same_codes = run.meta['tokenizer_fingerprint'] == self._fingerprint
    if same_kind and same_codes:
      return state, run.stats[generator.CODE_STATISTICS]
    return state, None


def load_tokenizer(config: ml_collections.ConfigDict) -> inference.Tokenizer:
  """The tokenizer that `config.tokenizer` names, for images of the data's size.

  Raises:
    ConfigError: none is named, or it has another image size.
  """
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a tokenizer run, as in '
      '--config.tokenizer=runs/tok'
    )
  if autoencoders.is_autoencoder(config.tokenizer):
    return inference.load_autoencoder(
      config.tokenizer, sizes.canonical(config.data.image_size)
    )
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  inputs.check_image_size(config, run.config)
  return inference_tokenizer.tokenizer_of(run)


def class_names(source: data.Source) -> tuple[str, ...]:
  """The classes that a generator of a source's images learns, at least one."""
  return source.class_names or (ONLY_CLASS,)


def make_generator_task(
  config: ml_collections.ConfigDict,
  encoders: frozen_encoders.FrozenEncoders,
  num_classes: int,
  *,
  cached: bool = False,
) -> generator.GeneratorTask:
  """The task of a generator; needs no data.

  The encoders may have shapes in place of parameters; for `cached` see
  `generator.GeneratorTask`.
  """
  tokenizer = encoders.tokenizer
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=num_classes,
    **model_fields(config, encoders),
  )
  objective = generator.Objective(**config.loss)
  return generator.GeneratorTask(model, objective, encoders, cached=cached)


def model_fields(
  config: ml_collections.ConfigDict, encoders: frozen_encoders.FrozenEncoders
) -> dict[str, Any]:
  """The model's fields, with those that tokenizer and teacher decide."""
  shapes = encoders.shapes
  cls_dim = shapes['cls'].shape[-1] if 'cls' in shapes else 0
  align_dim = 0
  if 'targets' in shapes:
    align_dim = shapes['targets'].shape[-1]
  elif encoders.align_mode == 'cls_only':
    align_dim = cls_dim
  return {
    **config.model.to_dict(),
    'positions': encoders.tokenizer.positions,
    'cls_dim': cls_dim,
    'align_dim': align_dim,
  }


def code_statistics(
  config: ml_collections.ConfigDict,
  task: generator.GeneratorTask,
  train: data.Source,
  mesh: Mesh,
) -> dict[str, Float[np.ndarray, ' e']]:
  """Mean and deviation of the codes of centre crops of the training images.

  All devices share batches of `evaluation.batch_size`: those of the training
  may be larger than the encoder has memory for.
  """
  kind = task.objective.latent_statistics
  count = task.objective.statistics_images
  if isinstance(train, data.TokenCache):
    if not count:
      # A cache knows the statistics of all its images.
      return as_statistics(train.statistics, kind)
    train = train.select(['codes'])
  encoder = task.encoders.tokenizer
  params = jax.device_put(
    encoder.params, sharding.tree_shardings(encoder.params, mesh)
  )

  # Every process gets all codes, so that all have the same statistics.
  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def encode(params: PyTree, batch: dict[str, Array]) -> tuple[Array, Array]:
    if 'image' not in batch:
      return batch['codes'], batch['mask']
    images = pixels.to_float(batch['image'])
    return encoder.encode(params, images), batch['mask']

  def codes() -> Iterator[Float[np.ndarray, 'b k e']]:
    for batch in inputs.eval_batches(config, train, mesh, num_images=count):
      made, mask = encode(params, sharding.put_batch(batch, mesh))
      yield np.asarray(made)[np.asarray(mask)]

  # As in a training, so that models split their activations over the mesh.
  with jax.set_mesh(mesh):
    return measure_codes(codes(), kind)


def measure_codes(
  codes: Iterable[Float[np.ndarray, 'b k e']], kind: str
) -> dict[str, Float[np.ndarray, ' e']]:
  """Mean and deviation of batches of codes; `kind` as in `as_statistics`."""
  sums = token_cache.Sums()
  for batch in codes:
    sums.add(batch)
  return as_statistics(token_cache.combine([sums]), kind)


def as_statistics(
  statistics: data.Statistics, kind: str
) -> dict[str, Float[np.ndarray, ' e']]:
  """Turns a cache's statistics into those that a state keeps.

  Args:
    statistics: of the codes.
    kind: 'channel', or 'scalar' for the same two numbers in every channel.
  """
  mean, std = statistics.channel_mean, statistics.channel_std
  if kind == 'scalar':
    width = len(mean)
    mean, std = (statistics.mean,) * width, (statistics.std,) * width
  return {
    'mean': np.asarray(mean, np.float32),
    # A constant channel is divided by this, not by 0.
    'std': np.maximum(np.asarray(std, np.float32), np.float32(1e-6)),
  }


def _sample_distance(
  config: ml_collections.ConfigDict,
  task: generator.GeneratorTask,
  tokenizer: inference.Tokenizer,
  val: data.Source,
  mesh: Mesh,
) -> tuple[data.EvalBatches, 'SampleDistance']:
  """All held-out images, and the evaluator that compares samples with them."""
  if config.data.cache and not config.data.path:
    raise errors.ConfigError(
      f'evaluation.num_samples={config.evaluation.num_samples} compares '
      'samples with images, and data.path is empty; name it beside data.cache, '
      'or set --config.evaluation.num_samples=0'
    )
  source = val
  if config.data.cache:
    source = inputs.open_images(config, 'val')
  if not data.is_same(source, val.fingerprint):
    raise errors.ConfigError(
      f'data.path={config.data.path} has other images than those of data.cache='
      f'{config.data.cache}; wanted the ones that were encoded'
    )
  images = inputs.eval_batches(config, source, mesh, num_images=0)
  return images, SampleDistance(
    task,
    tokenizer,
    inference.Sampling(**config.sampling),
    load_frechet(config.networks.frechet, tokenizer.patch_size),
    images,
    num_samples=config.evaluation.num_samples,
    batch_size=config.evaluation.batch_size,
    class_names=class_names(val),
  )


def load_frechet(spec: str, patch_size: int) -> pretrained.FeatureNetwork:
  """The feature network of a Frechet distance.

  Networks without weights see the tokenizer's patches.
  """
  if spec in pretrained.BUILTIN:
    return pretrained.load_network(spec, patch_size=patch_size)
  return pretrained.load_network(spec)


class Velocity:
  """Velocity losses on held-out images, at fixed times and noise.

  Beside the loss of the tokens stands that of a trivial predictor, the best one
  for Gaussian codes, which knows their mean and deviation and nothing else: the
  mean over t of (alpha d_sigma - d_alpha sigma)^2 / (alpha^2 + sigma^2), which
  is pi / 2 on the linear path.
  """

  def __init__(
    self,
    task: generator.GeneratorTask,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    frozen: PyTree,
  ):
    """Takes batches that can be read again, and placed frozen parameters."""
    self._task, self._batches, self._mesh = task, batches, mesh
    self._frozen = frozen
    self._measure = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, float]]:
    """Yields the losses of the running means of the parameters."""
    totals = scores.add_up(
      self._measure(
        state.ema[generator.GROUP],
        state.stats[generator.CODE_STATISTICS],
        self._frozen,
        sharding.put_batch(dict(batch), self._mesh),
        index,
      )
      for index, batch in enumerate(self._batches)
    )
    count = totals.pop('count')
    for name, total in totals.items():
      yield name, float(total / count)

  def _sums(
    self,
    params: PyTree,
    statistics: PyTree,
    frozen: PyTree,
    batch: Mapping[str, Array],
    index: Int[Array, ''],
  ) -> dict[str, Float[Array, '']]:
    """Sums of the losses over a batch, and the count of its images."""
    task = self._task
    encoded = task.encode(frozen, batch)
    # The same draws in every evaluation: a curve shows the training, not luck.
    time_key, noise_key = jax.random.split(
      jax.random.fold_in(jax.random.key(0), index)
    )
    # One time for each of b strata: far less noise than b free draws.
    b = batch['label'].shape[0]
    t = (jnp.arange(b) + jax.random.uniform(time_key, (b,))) / b
    t = jnp.maximum(t, task.path.min_time)
    terms = task.terms(
      params, encoded, batch['label'], t, noise_key, statistics, train=False
    )
    measured = {f'{name}_loss': term for name, term in terms.items()}
    measured['velocity_loss_gaussian'] = _gaussian_loss(task.path, t)
    weight = batch['mask'].astype(jnp.float32)
    sums = {name: jnp.sum(term * weight) for name, term in measured.items()}
    return {**sums, 'count': jnp.sum(weight)}


def _gaussian_loss(
  path: path_lib.Path, t: Float[Array, ' b']
) -> Float[Array, ' b']:
  """Residual of the best linear predictor of the velocity for unit data."""
  power = path.alpha(t) ** 2 + path.sigma(t) ** 2
  return path.determinant(t) ** 2 / power


class SampleDistance:
  """Frechet distance of samples to held-out images.

  Samples are those of the parameters' running means. Sample i has index i and
  label i modulo the classes in every evaluation, so a curve shows the training
  and not the draw. With several processes each makes its share.
  """

  def __init__(
    self,
    task: generator.GeneratorTask,
    tokenizer: inference.Tokenizer,
    sampling: inference.Sampling,
    network: pretrained.FeatureNetwork,
    images: Iterable[dict[str, np.ndarray]],
    *,
    num_samples: int,
    batch_size: int,
    class_names: Sequence[str],
  ):
    """Takes this process's share of the images, readable again and again.

    Raises:
      ConfigError: too few samples for a covariance, or for all processes.
    """
    least = max(2, jax.process_count())
    errors.require(
      num_samples >= least,
      'evaluation.num_samples',
      num_samples,
      f'{least} or more, one for each process and two for a covariance, or 0 '
      'for no samples',
    )
    self._network, self._images = network, images
    self._num_samples, self._batch_size = num_samples, batch_size
    self._class_names = class_names
    self._features = evaluate.image_features(network)
    # Without parameters: a whole model on every device would be in the way of
    # the training between two evaluations. Compiled programs stay.
    self._generator = inference.ImageGenerator(
      task.model,
      {},
      {},
      tokenizer,
      path=task.objective.path,
      sampling=sampling,
      class_names=class_names,
    )
    self._mesh = Mesh(
      np.array(jax.local_devices()), ('data',), axis_types=(AxisType.Auto,)
    )

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, float]]:
    """Yields the distance, named after the features."""
    params, statistics = _on_host(
      (state.ema[generator.GROUP], state.stats[generator.CODE_STATISTICS])
    )
    mine = np.arange(
      jax.process_index(), self._num_samples, jax.process_count()
    )
    # The training's mesh spans all processes, but each samples by itself.
    with jax.set_mesh(self._mesh):
      features = self._sampled(params, statistics, mine)
    sampled = frechet.fit([_gather(features)])
    name = self._network.name
    yield f'fd_{name}', frechet.frechet_distance(sampled, self._real)

  def _sampled(
    self, params: PyTree, statistics: PyTree, indices: Int[np.ndarray, ' n']
  ) -> Float[np.ndarray, 'n d']:
    """Features of the samples with these indices."""
    generator = self._generator.with_params(params, statistics)
    labels = evaluate.balanced_labels(self._num_samples, len(self._class_names))
    batches = evaluate.sample_batches(
      generator, labels, self._batch_size, indices=indices
    )
    features = [np.asarray(self._features(images)) for images in batches]
    return np.concatenate(features)

  @functools.cached_property
  def _real(self) -> frechet.Gaussian:
    """The Gaussian of the images, measured once."""
    with jax.set_mesh(self._mesh):
      features = [
        np.asarray(self._features(batch['image']))[batch['mask']]
        for batch in self._images
      ]
    return frechet.fit([_gather(np.concatenate(features))])


def _gather(own: Float[np.ndarray, 'n d']) -> Float[np.ndarray, 'm d']:
  """Features of all processes, from this one's own."""
  if jax.process_count() == 1:
    return own
  # Gathered arrays must have one shape; shares may differ by a row.
  counts = multihost_utils.process_allgather(np.asarray(len(own)))
  padded = np.resize(own, (int(counts.max()), own.shape[1]))
  every = multihost_utils.process_allgather(padded)
  return np.concatenate(
    [rows[:count] for rows, count in zip(every, counts, strict=True)]
  )


def _on_host(tree: PyTree) -> PyTree:
  """Fetches a tree; from a mesh of several hosts by gathering its shards."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
