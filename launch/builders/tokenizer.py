"""The two tasks that train a tokenizer: stage 1 and local scaling."""

from collections.abc import Mapping
from typing import Any

import ml_collections
from jax.sharding import Mesh

from launch.builders import common
from selfboottok_jax import data, errors, inference, pretrained
from selfboottok_jax.evaluation import evaluators
from selfboottok_jax.models import discriminator
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.tasks import objective, scaling
from selfboottok_jax.tasks import tokenizer as tokenizer_task
from selfboottok_jax.training import checkpointing


def build_tokenizer(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> common.Built:
  """Stage 1."""
  if config.tokenizer:
    raise errors.ConfigError(
      f'tokenizer={config.tokenizer}, but stage 1 starts from none; wanted '
      '--config.init_from to fine-tune, or configs/scaling.py for stage 2'
    )
  task = make_tokenizer_task(config)
  batches = common.eval_batches(config, common.open_data(config, 'val'), mesh)

  def start(state):
    if not config.init_from:
      return state
    run = checkpointing.read_run(
      config.init_from, what='init_from', task='tokenizer'
    )
    stored = {**run.params.get('base', {}), **run.ema['tokenizer']}
    return common.fine_tune(state, 'tokenizer', stored, config.init_from)

  return common.assemble(
    config,
    task,
    train,
    start=start,
    evaluators=lambda _: [evaluators.Reconstruction(task.model, batches, mesh)],
    model_fields=config.model.to_dict(),
  )


def build_scaling(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> common.Built:
  """Stage 2, from the tokenizer that `config.tokenizer` names."""
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a stage 1 run, as in '
      '--config.tokenizer=runs/tok'
    )
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  common.check_image_size(config, run.config)
  task = make_scaling_task(config, run.config)
  batches = common.eval_batches(config, common.open_data(config, 'val'), mesh)
  tokenizer = inference.tokenizer_of(run)
  stage2 = None
  if config.init_from:
    stage2 = _read_scaled(config, tokenizer.fingerprint)

  def start(state):
    optimizer = checkpointing.read_optimizer(config.tokenizer, run.step)
    state = scaling.start_from(state, run, optimizer)
    if stage2 is None:
      return state
    stored = {**stage2.params['base'], **stage2.ema['tokenizer']}
    return common.fine_tune(state, 'tokenizer', stored, config.init_from)

  return common.assemble(
    config,
    task,
    train,
    start=start,
    evaluators=lambda _: [evaluators.Reconstruction(task.model, batches, mesh)],
    model_fields=scaled_fields(config, run.config),
    tokenizer_fingerprint=tokenizer.fingerprint,
  )


def make_tokenizer_task(
  config: ml_collections.ConfigDict,
) -> tokenizer_task.TokenizerTask:
  """Stage 1, without data."""
  return tokenizer_task.TokenizerTask(
    *_tokenizer_parts(config, config.model.to_dict()), steps=config.train.steps
  )


def make_scaling_task(
  config: ml_collections.ConfigDict, stage1: Mapping[str, Any]
) -> scaling.ScalingTask:
  """Stage 2, without data; `stage1` is the configuration of stage 1's run."""
  model, *others = _tokenizer_parts(config, scaled_fields(config, stage1))
  if 'local2d' not in model.groups:
    raise errors.ConfigError(
      'model.local2d_depth=0; wanted the depth of the larger aligner'
    )
  return scaling.ScalingTask(
    model,
    *others,
    steps=config.train.steps,
    trainable=tuple(config.trainable),
  )


def scaled_fields(
  config: ml_collections.ConfigDict, stage1: Mapping[str, Any]
) -> dict[str, Any]:
  """Stage 1's model, but for the larger aligner."""
  return {**stage1['model'], **config.model.to_dict()}


def _read_scaled(config, fingerprint: str) -> checkpointing.Run:
  """The stage 2 run to fine-tune; CheckpointError for another tokenizer's."""
  run = checkpointing.read_run(
    config.init_from, what='init_from', task='scaling'
  )
  theirs = run.meta['tokenizer_fingerprint']
  if theirs != fingerprint:
    raise errors.CheckpointError(
      f'init_from={config.init_from} was scaled from another tokenizer than '
      f'tokenizer={config.tokenizer} ({theirs[:12]} there, {fingerprint[:12]} '
      'given); use the one that it was scaled from'
    )
  return run


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
