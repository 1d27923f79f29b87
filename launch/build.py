"""Turns a configuration into the objects of its task."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from launch import limits
from selfboottok_jax import data, errors, inference, pretrained
from selfboottok_jax.evaluation import evaluators
from selfboottok_jax.models import discriminator, sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.tasks import generator, objective, parts, scaling
from selfboottok_jax.tasks import tokenizer as tokenizer_task
from selfboottok_jax.training import checkpointing, loop, optim, sharding
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

  task: Any
  optimizers: dict[str, optim.Optimizer]
  start: Callable[[state_lib.TrainState], state_lib.TrainState]
  evaluators: Callable[[PyTree], list[loop.Evaluator]]
  meta: dict[str, Any]
  model_fields: dict[str, Any]


def open_data(config: ml_collections.ConfigDict, split: str) -> data.Source:
  """The images of a split."""
  return data.open_source(
    config.data.source, config.data.path, split, config.data.image_size
  )


def build(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> Built:
  """Builds the task that `config.task` names."""
  limits.check(checkpointing.flatten(config.to_dict()))
  if config.task not in TASKS:
    raise errors.ConfigError(
      f'task={config.task!r}; wanted one of {", ".join(TASKS)}'
    )
  return TASKS[config.task](config, train, mesh)


def build_optimizers(
  config: ml_collections.ConfigDict, groups: Any
) -> dict[str, optim.Optimizer]:
  """The same settings for every group, each with its own state."""
  return {
    group: optim.build_optimizer(steps=config.train.steps, **config.optimizer)
    for group in groups
  }


def eval_batches(
  config: ml_collections.ConfigDict, source: data.Source, mesh: Mesh
) -> data.EvalBatches:
  """Centre crops in a fixed order, of this process's share."""
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


def _networks(
  config: ml_collections.ConfigDict,
  model: tokenizer_lib.Tokenizer,
  goal: objective.Objective,
) -> dict[str, Any]:
  """Frozen networks of the active terms, on the tokenizer's patch grid."""
  options = {
    'hog': {'patch_size': model.patch_size},
    'dct': {'patch_size': model.patch_size, 'dim': model.token_dim},
    'random': {'patch_size': model.patch_size, 'dim': model.token_dim},
    # Its maps have stride 16.
    'mobilenet_v2': {'image_size': 16 * model.image_size // model.patch_size},
  }
  networks = {}
  for term in objective.active_terms(model, goal):
    spec = config.networks[term]
    if term == 'perceptual':
      load, own = pretrained.load_perceptual, {}
      if spec in options:
        own = {'patch_size': model.patch_size}
    else:
      load, own = pretrained.load_network, options.get(spec.split(':')[0], {})
    networks[term] = load(spec, **own)
  return networks


def _tokenizer_parts(config, model_fields):
  model = tokenizer_lib.Tokenizer(
    image_size=config.data.image_size, **model_fields
  )
  model.check()
  goal = objective.Objective(**config.loss)
  critic = None
  if goal.adversarial:
    critic = discriminator.Discriminator(
      **config.discriminator, dtype=model.dtype
    )
  return model, goal, _networks(config, model, goal), critic


def _build_tokenizer(config, train, mesh) -> Built:
  if config.tokenizer:
    raise errors.ConfigError(
      f'tokenizer={config.tokenizer}, but stage 1 starts from none; wanted '
      '--config.init_from to fine-tune, or configs/scaling.py for stage 2'
    )
  fields = config.model.to_dict()
  model, goal, networks, critic = _tokenizer_parts(config, fields)
  batches = eval_batches(config, open_data(config, 'val'), mesh)
  task = tokenizer_task.TokenizerTask(
    model, goal, networks, critic, steps=config.train.steps
  )

  def start(state):
    if not config.init_from:
      return state
    run = checkpointing.read_run(
      config.init_from, what='init_from', task='tokenizer'
    )
    stored = {**run.params.get('base', {}), **run.ema['tokenizer']}
    return _fine_tune(state, 'tokenizer', stored, config.init_from)

  return Built(
    task,
    build_optimizers(config, task.groups),
    start,
    lambda _: [evaluators.Reconstruction(model, batches, mesh)],
    {'class_names': list(train.class_names)},
    fields,
  )


def _build_scaling(config, train, mesh) -> Built:
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a stage 1 run, as in '
      '--config.tokenizer=runs/tok'
    )
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  _check_image_size(config, run)
  fields = {**run.config['model'], **config.model.to_dict()}
  model, goal, networks, critic = _tokenizer_parts(config, fields)
  if 'local2d' not in model.groups:
    raise errors.ConfigError(
      'model.local2d_depth=0; wanted the depth of the larger aligner'
    )
  batches = eval_batches(config, open_data(config, 'val'), mesh)
  task = scaling.ScalingTask(
    model,
    goal,
    networks,
    critic,
    steps=config.train.steps,
    trainable=tuple(config.trainable),
  )

  def start(state):
    optimizer = checkpointing.read_optimizer(config.tokenizer, run.step)
    state = scaling.start_from(state, run, optimizer)
    if not config.init_from:
      return state
    stage2 = checkpointing.read_run(
      config.init_from, what='init_from', task='scaling'
    )
    stored = {**stage2.params['base'], **stage2.ema['tokenizer']}
    return _fine_tune(state, 'tokenizer', stored, config.init_from)

  tokenizer = inference.tokenizer_of(run)
  return Built(
    task,
    build_optimizers(config, task.groups),
    start,
    lambda _: [evaluators.Reconstruction(model, batches, mesh)],
    {
      'class_names': list(train.class_names),
      'tokenizer_fingerprint': tokenizer.fingerprint,
    },
    fields,
  )


def _build_generator(config, train, mesh) -> Built:
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a tokenizer run, as in '
      '--config.tokenizer=runs/tok'
    )
  if not train.class_names:
    raise errors.DataError(
      f'data.path={config.data.path} has no class folders; a generator wanted '
      'PHOTOS/CLASS/*.jpg, or PHOTOS/train/CLASS/*.jpg'
    )
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  _check_image_size(config, run)
  tokenizer = inference.tokenizer_of(run)
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=len(train.class_names),
    **config.model,
  )
  if model.width % model.heads:
    raise errors.ConfigError(
      f'model.width={model.width} does not divide by model.heads='
      f'{model.heads}; change one of the two'
    )
  goal = generator.Objective(**config.loss)
  task = generator.GeneratorTask(model, goal, tokenizer.model, tokenizer.params)

  def start(state):
    latents = None
    if config.init_from:
      source = checkpointing.read_run(
        config.init_from, what='init_from', task='generator'
      )
      state = _fine_tune(
        state,
        'generator',
        source.ema['generator'],
        config.init_from,
        # Other classes: their embeddings start fresh.
        may_differ=('label_table',),
      )
      # Of the same codes, the same normalisation.
      if source.meta['tokenizer_fingerprint'] == tokenizer.fingerprint:
        latents = source.stats['latents']
    if latents is None:
      latents = _latents(config, goal, tokenizer, train)
    placed = jax.tree.map(
      lambda new, old: jax.device_put(np.asarray(new), old.sharding),
      dict(latents),
      state.stats['latents'],
    )
    return state.replace(stats={**state.stats, 'latents': placed})

  batches = eval_batches(config, open_data(config, 'val'), mesh)
  return Built(
    task,
    build_optimizers(config, task.groups),
    start,
    lambda frozen: [evaluators.Velocity(task, batches, mesh, frozen)],
    {
      'class_names': list(train.class_names),
      'tokenizer_fingerprint': tokenizer.fingerprint,
    },
    config.model.to_dict(),
  )


TASKS = {
  'tokenizer': _build_tokenizer,
  'scaling': _build_scaling,
  'generator': _build_generator,
}


def _check_image_size(config, run) -> None:
  trained = run.config['data']['image_size']
  if config.data.image_size != trained:
    raise errors.ConfigError(
      f'data.image_size={config.data.image_size}, but tokenizer='
      f'{run.workdir} was trained at {trained}; set '
      f'--config.data.image_size={trained}'
    )


def _fine_tune(state, group, stored, workdir, may_differ=()):
  """Parameters from another run, moments and means from scratch."""
  taken = parts.adopt(
    state.params[group],
    stored,
    what=f'init_from={workdir}',
    may_differ=may_differ,
  )
  return state.replace(
    params={**state.params, group: taken},
    ema={**state.ema, group: jax.tree.map(jax.numpy.copy, taken)},
  )


def _latents(config, goal, tokenizer, train):
  """Statistics of the codes of centre crops of the training images."""
  batches = data.make_eval_dataset(
    train,
    batch_size=config.data.batch_size,
    image_size=config.data.image_size,
    num_images=min(goal.statistics_images, len(train)),
    num_threads=config.data.num_threads,
  )
  encoded = (
    np.asarray(tokenizer.encode(batch['image']))[batch['mask']]
    for batch in batches
  )
  return generator.measure_latents(encoded, goal.latent_statistics)
