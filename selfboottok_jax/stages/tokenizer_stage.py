"""Stages 1 and 2, which train a tokenizer, from their configurations."""

from collections.abc import Mapping
from typing import Any

import ml_collections
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import data, errors, pretrained, sizes
from selfboottok_jax.inference import tokenizer as inference_tokenizer
from selfboottok_jax.models import discriminators
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import (
  initialization,
  inputs,
  networks,
  objective,
  scaling,
  tokenizer,
  watching,
)
from selfboottok_jax.training import checkpointing, loop
from selfboottok_jax.training import state as state_lib

DISCRIMINATORS = {
  'dino': discriminators.DinoDiscriminator,
  'stylegan': discriminators.StyleGanDiscriminator,
}


class TokenizerStage:
  """Stage 1: the whole tokenizer. Attributes are those of `stages.Stage`."""

  shown = watching.SHOWN

  def __init__(
    self, config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
  ):
    """Loads the frozen networks and opens the held-out images."""
    if config.tokenizer:
      raise errors.ConfigError(
        f'tokenizer={config.tokenizer}, but stage 1 starts from none; wanted '
        '--config.init_from to fine-tune, or configs/scaling.py for stage 2'
      )
    self._config = config
    self.task = make_tokenizer_task(config)
    self.model_fields = config.model.to_dict()
    self.meta: dict[str, Any] = {'class_names': list(train.class_names)}
    self.held_out, self._evaluator = watching.held_out(
      config, self.task.model, train, mesh
    )

  def start(self, fresh: state_lib.TrainState) -> state_lib.TrainState:
    """Starts fresh, from another run (`init_from`) or from a teacher's encoder.

    A run to fine-tune brings an encoder, so `encoder_from` counts only without
    one.
    """
    config = self._config
    if config.init_from:
      run = checkpointing.read_run(
        config.init_from, what='init_from', task='tokenizer'
      )
      stored = {**run.params.get('base', {}), **run.ema['tokenizer']}
      return initialization.fine_tune(
        fresh, 'tokenizer', stored, config.init_from
      )
    if not config.encoder_from:
      return fresh
    network, params = pretrained.load_vit(
      config.encoder_from,
      grid=initialization.GRID,
      patch_size=initialization.PATCH_SIZE,
    )
    return initialization.start_encoder(
      fresh, self.task.model, network, params, config.encoder_from
    )

  def evaluators(self, frozen: PyTree) -> list[loop.Evaluator]:
    """Everything that `watching` measures on held-out images."""
    del frozen
    return [self._evaluator]


class ScalingStage:
  """Stage 2: a larger local aligner for the tokenizer of another run.

  Attributes are those of `stages.Stage`.
  """

  shown = watching.SHOWN

  def __init__(
    self, config: ml_collections.ConfigDict, train: data.Source, mesh: Mesh
  ):
    """Reads stage 1's run, loads frozen networks, opens held-out images."""
    if not config.tokenizer:
      raise errors.ConfigError(
        'tokenizer is empty; wanted the workdir of a stage 1 run, as in '
        '--config.tokenizer=runs/tok'
      )
    self._config = config
    self._stage1 = checkpointing.read_run(
      config.tokenizer, what='tokenizer', task='tokenizer'
    )
    inputs.check_image_size(config, self._stage1.config)
    self.task = make_scaling_task(config, self._stage1.config)
    self.model_fields = scaled_fields(config, self._stage1.config)
    self.held_out, self._evaluator = watching.held_out(
      config, self.task.model, train, mesh
    )
    fingerprint = _fingerprint(self._stage1)
    self.meta: dict[str, Any] = {
      'class_names': list(train.class_names),
      'tokenizer_fingerprint': fingerprint,
    }
    self._stage2 = None
    if config.init_from:
      self._stage2 = _read_scaled(config, fingerprint)

  def start(self, fresh: state_lib.TrainState) -> state_lib.TrainState:
    """Continues stage 1 and, with `init_from`, a stage 2 of the same one."""
    config, stage2 = self._config, self._stage2
    optimizer = checkpointing.read_optimizer(
      config.tokenizer, self._stage1.step
    )
    state = scaling.start_from(fresh, self._stage1, optimizer)
    if stage2 is None:
      return state
    stored = {**stage2.params['base'], **stage2.ema['tokenizer']}
    return initialization.fine_tune(
      state, 'tokenizer', stored, config.init_from
    )

  def evaluators(self, frozen: PyTree) -> list[loop.Evaluator]:
    """Everything that `watching` measures on held-out images."""
    del frozen
    return [self._evaluator]


def make_tokenizer_task(
  config: ml_collections.ConfigDict, *, abstract: bool = False
) -> tokenizer.TokenizerTask:
  """The task of stage 1; needs no data.

  With `abstract`, frozen networks have shapes in place of parameters, and no
  file is read.
  """
  parts = _parts(config, config.model.to_dict(), abstract)
  model = parts[0]
  spec = config.encoder_from
  if spec and not config.init_from:
    initialization.check_gains(model, spec)
    network, _ = pretrained.load_vit(
      spec,
      grid=initialization.GRID,
      patch_size=initialization.PATCH_SIZE,
      abstract=True,
    )
    initialization.check_sizes(model, network, spec)
  return tokenizer.TokenizerTask(*parts, steps=config.train.steps)


def make_scaling_task(
  config: ml_collections.ConfigDict,
  stage1: Mapping[str, Any],
  *,
  abstract: bool = False,
) -> scaling.ScalingTask:
  """The task of stage 2; needs no data.

  Args:
    config: of stage 2.
    stage1: the configuration of stage 1's run.
    abstract: see `make_tokenizer_task`.
  """
  parts = _parts(config, scaled_fields(config, stage1), abstract)
  if 'local2d' not in parts[0].groups:
    raise errors.ConfigError(
      'model.local2d_depth=0; wanted the depth of the larger aligner'
    )
  return scaling.ScalingTask(
    *parts,
    steps=config.train.steps,
    trainable=tuple(config.trainable),
  )


def scaled_fields(
  config: ml_collections.ConfigDict, stage1: Mapping[str, Any]
) -> dict[str, Any]:
  """The fields of stage 1's model, with those that stage 2 changes."""
  return {**stage1['model'], **config.model.to_dict()}


def _fingerprint(run: checkpointing.Run) -> str:
  """The fingerprint of a tokenizer's run; nothing goes to a device."""
  model = tokenizer_lib.Tokenizer(
    image_size=sizes.canonical(run.config['data']['image_size']),
    **run.config['model'],
  )
  params = tokenizer_lib.served_params(run.params, run.ema)
  return inference_tokenizer.fingerprint(model, params)


def _read_scaled(
  config: ml_collections.ConfigDict, fingerprint: str
) -> checkpointing.Run:
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


def _parts(
  config: ml_collections.ConfigDict,
  model_fields: Mapping[str, Any],
  abstract: bool,
) -> tuple[
  tokenizer_lib.Tokenizer,
  objective.Objective,
  dict[str, Any],
  critic_lib.Critic | None,
]:
  """Model, objective, networks by term and discriminator of either stage."""
  model = tokenizer_lib.Tokenizer(
    image_size=sizes.canonical(config.data.image_size), **model_fields
  )
  model.check()
  goal = objective.Objective(**config.loss)
  trainable = tuple(config.trainable) if 'trainable' in config else None
  # One error names all networks that lack weights, not just the first.
  loader = networks.Loader(abstract=abstract)
  terms = loader.terms(
    config, model, objective.active_terms(model, goal, trainable)
  )
  critic = None
  if goal.adversarial:
    critic = _critic(config, goal, model, loader)
  loader.check()
  for term in ('repa_global', 'repa_local'):
    if term in terms:
      objective.check_pairing(model, goal, term, terms[term])
  return model, goal, terms, critic


def _critic(
  config: ml_collections.ConfigDict,
  goal: objective.Objective,
  model: tokenizer_lib.Tokenizer,
  loader: networks.Loader,
) -> critic_lib.Critic:
  """The discriminator of `discriminator.kind`, with its trunk if any."""
  kind = config.discriminator.kind
  errors.require_choice('discriminator.kind', kind, DISCRIMINATORS)
  fields = config.discriminator[kind]
  module = DISCRIMINATORS[kind](**fields, dtype=model.dtype)
  module.check()
  trunk = None
  if kind == 'dino':
    trunk = loader.trunk(
      config.networks.discriminator, model.dtype, model.attention
    )
  return critic_lib.Critic(module, goal, trunk)
