"""What is measured while a generator trains: its loss, and its samples."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import inference
from selfboottok_jax.evaluation import evaluate, frechet
from selfboottok_jax.stages import generator as generator_task
from selfboottok_jax.training import sharding
from selfboottok_jax.training import state as state_lib


class Velocity:
  """The velocity losses on held-out images, at fixed times and noise.

  Beside that of the tokens is what the best guess for Gaussian codes would
  score, which knows their mean and deviation and nothing else: the mean over t
  of 1 / (alpha^2 + sigma^2) x (alpha d_sigma - d_alpha sigma)^2, pi / 2 on the
  linear path.
  """

  def __init__(
    self,
    task: generator_task.GeneratorTask,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    frozen: PyTree,
  ):
    """`frozen` are the task's frozen parameters as placed for training."""
    self._task, self._batches, self._mesh = task, batches, mesh
    self._frozen = frozen
    self._measure = jax.jit(self._sums, out_shardings=sharding.replicated(mesh))

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, float]]:
    """Scores of the running means of a training's parameters."""
    totals = None
    for index, batch in enumerate(self._batches):
      placed = sharding.put_batch(dict(batch), self._mesh)
      sums = self._measure(
        state.ema['generator'],
        state.stats['latents'],
        self._frozen,
        placed,
        index,
      )
      totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    totals = jax.device_get(totals)
    count = totals.pop('count')
    for name, total in totals.items():
      yield name, float(total / count)

  def _sums(self, params, latents, frozen, batch, index):
    task, batch = self._task, dict(batch)
    if 'image' in batch:
      batch['image'] = batch['image'].astype(jnp.float32) / 127.5 - 1
    encoded = task.encode(frozen, batch)
    time_key, noise_key = jax.random.split(
      jax.random.fold_in(jax.random.key(0), index)
    )
    # One draw for each stratum: less noise between evaluations.
    b = batch['label'].shape[0]
    t = (jnp.arange(b) + jax.random.uniform(time_key, (b,))) / b
    t = jnp.maximum(t, task.path.min_time)
    terms = task.terms(
      params, encoded, batch['label'], t, noise_key, latents, train=False
    )
    measured = {f'{name}_loss': term for name, term in terms.items()}
    measured['velocity_loss_gaussian'] = _gaussian_loss(task.path, t)
    weight = batch['mask'].astype(jnp.float32)
    sums = {name: jnp.sum(term * weight) for name, term in measured.items()}
    return {**sums, 'count': jnp.sum(weight)}


def _gaussian_loss(path, t: Float[Array, ' b']) -> Float[Array, ' b']:
  """Residual of the best linear guess of the velocity for unit data."""
  power = path.alpha(t) ** 2 + path.sigma(t) ** 2
  determinant = path.alpha(t) * path.d_sigma(t) - path.d_alpha(t) * path.sigma(
    t
  )
  return determinant**2 / power


class SampleDistance:
  """Frechet distance of samples of the running means to held-out images.

  Sample i has index i and label i modulo the classes in every evaluation, so a
  curve shows the training and not the draw. With several processes each makes
  its share.
  """

  def __init__(
    self,
    task: generator_task.GeneratorTask,
    tokenizer: inference.ImageTokenizer | inference.ImageAutoencoder,
    sampling: inference.Sampling,
    network: Any,
    images: Iterable[dict[str, np.ndarray]],
    *,
    num_samples: int,
    batch_size: int,
    class_names: Sequence[str],
  ):
    """Takes this process's share of the images, readable again and again."""
    self._task, self._tokenizer = task, tokenizer
    self._sampling, self._network, self._images = sampling, network, images
    self._num_samples, self._batch_size = num_samples, batch_size
    self._class_names = class_names
    self._features = evaluate.image_features(network)
    self._generator = None
    self._mesh = Mesh(
      np.array(jax.local_devices()), ('data',), axis_types=(AxisType.Auto,)
    )

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, float]]:
    """Yields the distance, named after the features."""
    params, latents = _on_host((state.ema['generator'], state.stats['latents']))
    mine = np.arange(jax.process_index(), self._num_samples, _processes())
    # A training's mesh is of all processes, and each samples by itself.
    with jax.set_mesh(self._mesh):
      features = self._sampled(params, latents, mine)
    sampled = frechet.fit([_gather(features)])
    name = self._network.name
    yield f'fd_{name}', frechet.frechet_distance(sampled, self._real)

  def _sampled(self, params, latents, indices) -> Float[np.ndarray, 'n d']:
    """Features of the samples of these indices."""
    if self._generator is None:
      self._generator = inference.ImageGenerator(
        self._task.model,
        params,
        latents,
        self._tokenizer,
        path=self._task.objective.path,
        sampling=self._sampling,
        class_names=self._class_names,
      )
    self._generator.params = params
    labels = evaluate.balanced_labels(self._num_samples, len(self._class_names))
    batches = evaluate.sample_batches(
      self._generator, labels, self._batch_size, indices=indices
    )
    features = [np.asarray(self._features(images)) for images in batches]
    # A whole model on every device is in the way of the training.
    self._generator.params = None
    return np.concatenate(features)

  @functools.cached_property
  def _real(self) -> frechet.Gaussian:
    """Of the images; measured once."""
    with jax.set_mesh(self._mesh):
      features = [
        np.asarray(self._features(batch['image']))[batch['mask']]
        for batch in self._images
      ]
    return frechet.fit([_gather(np.concatenate(features))])


def _gather(own: Float[np.ndarray, 'n d']) -> Float[np.ndarray, 'm d']:
  """Features of all processes."""
  if _processes() == 1:
    return own
  # Shares differ by a row or so, and what is gathered must not.
  counts = multihost_utils.process_allgather(np.asarray(len(own)))
  padded = np.resize(own, (int(counts.max()), own.shape[1]))
  every = multihost_utils.process_allgather(padded)
  return np.concatenate(
    [rows[:count] for rows, count in zip(every, counts, strict=True)]
  )


def _processes() -> int:
  return jax.process_count()


def _on_host(tree):
  """Arrays of a mesh of several hosts cannot be moved to devices of one."""
  if _processes() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
