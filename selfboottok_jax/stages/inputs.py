"""What the building of every task shares."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import data, errors
from selfboottok_jax.models import tokenizer_params
from selfboottok_jax.stages import provenance, task
from selfboottok_jax.training import loop, optim, sharding
from selfboottok_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Built:
  """A task and what surrounds it.

  Attributes:
    task: losses, groups, frozen networks.
    optimizers: one per trained group.
    start: turns a fresh state into the one that training begins with.
    evaluators: builds what is measured, given the placed frozen parameters.
    meta: saved beside every checkpoint.
    model_fields: the model's fields, complete, for config.json.
  """

  task: task.Task
  optimizers: dict[str, optim.Optimizer]
  start: Callable[[state_lib.TrainState], state_lib.TrainState]
  evaluators: Callable[[PyTree], list[loop.Evaluator]]
  meta: dict[str, Any]
  model_fields: dict[str, Any]


def open_data(config: ml_collections.ConfigDict, split: str) -> data.Source:
  """The images of a split, or what `data.cache` kept of them.

  Raises:
    ConfigError: random crops of a cache, or one of another image size.
    DataError: images or a cache that cannot be read, or a cache without what
      the losses want.
  """
  if 'cache' in config.data and config.data.cache:
    cached = data.open_latents(config.data.cache, split)
    cached.check_use(
      config.data.image_size, random_crop=config.data.random_crop
    )
    names = provenance.wanted_fields(config)
    if split != 'train':
      # Most of a record, and only training aligns.
      names = tuple(name for name in names if name != 'targets')
    return cached.select(names)
  return data.open_source(
    config.data.source, config.data.path, split, config.data.image_size
  )


def build_optimizers(
  config: ml_collections.ConfigDict, groups: Any
) -> dict[str, optim.Optimizer]:
  """The same settings for every group, each with its own state."""
  return {
    group: optim.build_optimizer(steps=config.train.steps, **config.optimizer)
    for group in groups
  }


def assemble(
  config: ml_collections.ConfigDict,
  task: task.Task,
  train: data.Source,
  *,
  start: Callable[[state_lib.TrainState], state_lib.TrainState],
  evaluators: Callable[[PyTree], list[loop.Evaluator]],
  model_fields: dict[str, Any],
  **meta: Any,
) -> Built:
  """Adds what every task has: optimizers, and class names in `meta`."""
  return Built(
    task,
    build_optimizers(config, task.groups),
    start,
    evaluators,
    {'class_names': list(train.class_names), **meta},
    model_fields,
  )


def train_batches(
  config: ml_collections.ConfigDict, source: data.Source, *, start_step: int
) -> data.TrainBatches:
  """Augmented batches of this process's share, from that of `start_step` on.

  Of a cache they are in the same order as of its images, flips included.
  """
  return data.make_train_dataset(
    source,
    batch_size=config.data.batch_size,
    image_size=config.data.image_size,
    seed=config.train.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    flip=config.data.flip,
    random_crop=config.data.random_crop,
  )


def eval_batches(
  config: ml_collections.ConfigDict, source: data.Source, mesh: Mesh
) -> data.EvalBatches:
  """Centre crops in a fixed order, or a cache's, of this process's share."""
  sharding.check_batch_size(
    config.evaluation.batch_size, mesh, 'evaluation.batch_size'
  )
  return data.make_eval_dataset(
    source,
    batch_size=config.evaluation.batch_size,
    image_size=config.data.image_size,
    num_images=config.evaluation.num_images or None,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
  )


def check_image_size(
  config: ml_collections.ConfigDict, stage1: Mapping[str, Any]
) -> None:
  """ConfigError unless images are of the size of a tokenizer's `stage1`."""
  trained = stage1['data']['image_size']
  if config.data.image_size != trained:
    raise errors.ConfigError(
      f'data.image_size={config.data.image_size}, but tokenizer='
      f'{config.tokenizer or config.assumed.tokenizer} is of {trained}; set '
      f'--config.data.image_size={trained}'
    )


def fine_tune(
  state: state_lib.TrainState,
  group: str,
  stored: PyTree,
  workdir: str,
  may_differ: Sequence[str] = (),
) -> state_lib.TrainState:
  """Parameters from another run, moments and means from scratch."""
  taken = tokenizer_params.adopt(
    state.params[group],
    stored,
    what=f'init_from={workdir}',
    may_differ=may_differ,
  )
  return state.replace(
    params={**state.params, group: taken},
    ema={**state.ema, group: jax.tree.map(jax.numpy.copy, taken)},
  )
