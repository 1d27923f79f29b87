"""The two tasks that train a tokenizer: stage 1 and local scaling."""

from collections.abc import Mapping
from typing import Any

import ml_collections
from jax.sharding import Mesh

from selfboottok_jax import data, errors, inference, pretrained
from selfboottok_jax.evaluation import reconstruction
from selfboottok_jax.models import dino_discriminator, stylegan_discriminator
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import (
  encoder_init,
  inputs,
  networks,
  objective,
  scaling,
)
from selfboottok_jax.stages import tokenizer as tokenizer_task
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import state as state_lib

DISCRIMINATORS = {
  'dino': dino_discriminator.DinoDiscriminator,
  'stylegan': stylegan_discriminator.StyleGanDiscriminator,
}


def build_tokenizer(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> inputs.Built:
  """Stage 1."""
  if config.tokenizer:
    raise errors.ConfigError(
      f'tokenizer={config.tokenizer}, but stage 1 starts from none; wanted '
      '--config.init_from to fine-tune, or configs/scaling.py for stage 2'
    )
  task = make_tokenizer_task(config)
  batches = inputs.eval_batches(config, inputs.open_data(config, 'val'), mesh)

  def start(state):
    if not config.init_from:
      return _start_encoder(config, task.model, state)
    run = checkpointing.read_run(
      config.init_from, what='init_from', task='tokenizer'
    )
    stored = {**run.params.get('base', {}), **run.ema['tokenizer']}
    return inputs.fine_tune(state, 'tokenizer', stored, config.init_from)

  return inputs.assemble(
    config,
    task,
    train,
    start=start,
    evaluators=lambda _: [
      reconstruction.Reconstruction(task.model, batches, mesh)
    ],
    model_fields=config.model.to_dict(),
  )


def build_scaling(
  config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
) -> inputs.Built:
  """Stage 2, from the tokenizer that `config.tokenizer` names."""
  if not config.tokenizer:
    raise errors.ConfigError(
      'tokenizer is empty; wanted the workdir of a stage 1 run, as in '
      '--config.tokenizer=runs/tok'
    )
  run = checkpointing.read_run(
    config.tokenizer, what='tokenizer', task='tokenizer'
  )
  inputs.check_image_size(config, run.config)
  task = make_scaling_task(config, run.config)
  batches = inputs.eval_batches(config, inputs.open_data(config, 'val'), mesh)
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
    return inputs.fine_tune(state, 'tokenizer', stored, config.init_from)

  return inputs.assemble(
    config,
    task,
    train,
    start=start,
    evaluators=lambda _: [
      reconstruction.Reconstruction(task.model, batches, mesh)
    ],
    model_fields=scaled_fields(config, run.config),
    tokenizer_fingerprint=tokenizer.fingerprint,
  )


def make_tokenizer_task(
  config: ml_collections.ConfigDict, *, abstract: bool = False
) -> tokenizer_task.TokenizerTask:
  """Stage 1, without data; `abstract`: frozen networks have shapes alone."""
  model, *others = _tokenizer_parts(config, config.model.to_dict(), abstract)
  networks.check_encoder(config, model)
  return tokenizer_task.TokenizerTask(model, *others, steps=config.train.steps)


def make_scaling_task(
  config: ml_collections.ConfigDict,
  stage1: Mapping[str, Any],
  *,
  abstract: bool = False,
) -> scaling.ScalingTask:
  """Stage 2, without data; `stage1` is the configuration of stage 1's run."""
  fields = scaled_fields(config, stage1)
  model, *others = _tokenizer_parts(config, fields, abstract)
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


def _start_encoder(
  config: ml_collections.ConfigDict,
  model: tokenizer_lib.Tokenizer,
  state: state_lib.TrainState,
) -> state_lib.TrainState:
  """A fresh state, its encoder from the transformer that is named, if any."""
  spec = config.encoder_from
  if not spec:
    return state
  network, params = pretrained.load_vit(
    spec, grid=encoder_init.GRID, patch_size=encoder_init.PATCH_SIZE
  )
  return encoder_init.start(state, model, network, params, spec)


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


def _tokenizer_parts(config, model_fields, abstract):
  model = tokenizer_lib.Tokenizer(
    image_size=config.data.image_size, **model_fields
  )
  model.check()
  goal = objective.Objective(**config.loss)
  loader = networks.Loader(abstract=abstract)
  terms = loader.terms(
    config, model, networks.active_terms(config, model, goal)
  )
  critic = None
  if goal.adversarial:
    critic = _critic(config, goal, model.dtype, loader)
  loader.check()
  return model, goal, terms, critic


def _critic(
  config: ml_collections.ConfigDict,
  goal: objective.Objective,
  dtype: str,
  loader: networks.Loader,
) -> critic_lib.Critic:
  """The discriminator of `config.discriminator.kind`, with its trunk if any."""
  kind = config.discriminator.kind
  if kind not in DISCRIMINATORS:
    raise errors.ConfigError(
      f'discriminator.kind={kind!r}; wanted one of {", ".join(DISCRIMINATORS)}'
    )
  module = DISCRIMINATORS[kind](**config.discriminator[kind], dtype=dtype)
  trunk = None
  if kind == 'dino':
    trunk = loader.trunk(config.networks.discriminator, dtype)
  return critic_lib.Critic(module, goal, trunk)
