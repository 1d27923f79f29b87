"""Trainings of a few updates: a tokenizer, a larger aligner, a generator."""

import pathlib
from unittest import mock

import jax
import ml_collections

from configs import generator, scaling, tokenizer
from launch import trainer
from selfboottok_jax.training import state as state_lib
from tests import tiny

BATCH, STEPS = 8, 2


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A quickstart configuration that compiles and runs in seconds."""
  config.data.source, config.data.path = 'procedural', ''
  config.data.image_size = tiny.TOKENIZER['image_size']
  config.data.batch_size = BATCH
  config.data.num_threads = 1
  config.train.steps = STEPS
  config.train.log_every = 1
  config.evaluation.every = 0
  config.evaluation.num_images = BATCH
  config.evaluation.batch_size = BATCH
  config.model.unroll = 1
  if 'networks' in config:
    config.loss.perceptual = 0.0
    config.loss.transport = 0.0
    config.loss.repa_local = 0.0
    config.loss.projector_width = 8
    config.loss.adversarial_start = 0.0
    config.discriminator.width = 4
    config.discriminator.max_width = 8
  return config


def tokenizer_config() -> ml_collections.ConfigDict:
  config = shrink(tokenizer.get_config('quickstart'))
  for name, value in tiny.TOKENIZER.items():
    if name != 'image_size':
      config.model[name] = value
  return config


def scaling_config(tokenizer_workdir) -> ml_collections.ConfigDict:
  config = shrink(scaling.get_config('quickstart'))
  config.tokenizer = str(tokenizer_workdir)
  config.model.local2d_width, config.model.local2d_depth = 24, 2
  return config


def generator_config(tokenizer_workdir) -> ml_collections.ConfigDict:
  config = shrink(generator.get_config('quickstart'))
  config.tokenizer = str(tokenizer_workdir)
  config.model.width, config.model.depth, config.model.heads = 16, 1, 2
  config.loss.statistics_images = 2 * BATCH
  config.sampling.num_steps = 4
  return config


def train_all(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Trains one run of every task; returns their workdirs."""
  runs = {name: folder / name for name in ('tokenizer', 'scaled', 'generator')}
  for name, config in (
    ('tokenizer', tokenizer_config()),
    ('scaled', scaling_config(runs['tokenizer'])),
    ('generator', generator_config(runs['tokenizer'])),
  ):
    train(config, runs[name])
  return runs


def train(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> state_lib.TrainState:
  """Trains on one device: eight fake ones take a minute to compile for."""
  with mock.patch.object(jax, 'devices', return_value=jax.devices()[:1]):
    return trainer.train(config, str(workdir))
