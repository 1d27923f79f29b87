"""Tasks without data and without weights, to be sized and timed."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import errors, pretrained
from selfboottok_jax.inference import tokenizer
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.presets import tokenizer as tokenizer_config
from selfboottok_jax.pretrained import autoencoders
from selfboottok_jax.stages import (
  encoding_builder,
  generator_stage,
  inputs,
  task,
  tokenizer_stage,
)
from selfboottok_jax.stages import generator as generator_task
from selfboottok_jax.training import optim, sharding, workdirs


@dataclasses.dataclass(frozen=True)
class Outline:
  """A task without data.

  Attributes:
    task: as trained; frozen networks, and a tokenizer of which nothing is known
      but its shapes, have these in place of parameters.
    optimizers: one per trained group.
    assumed: what was supposed because nothing was given, a line for each.
  """

  task: task.Task
  optimizers: dict[str, optim.Optimizer]
  assumed: list[str]


def has_data(config: ml_collections.ConfigDict) -> bool:
  """Whether the configuration says where images are."""
  given = config.data.path or config.data.get('cache', '')
  return bool(given) or config.data.source == 'procedural'


def outline(config: ml_collections.ConfigDict) -> Outline:
  """The task of a configuration; what is missing is assumed and named."""
  assumed = []
  num_classes = _count_classes(config, assumed)
  if config.task == 'tokenizer':
    task = tokenizer_stage.make_tokenizer_task(config, abstract=True)
  elif config.task == 'scaling':
    stage1 = _stage1(config, assumed)
    task = tokenizer_stage.make_scaling_task(config, stage1, abstract=True)
  else:
    task = _generator(config, assumed, num_classes)
  optimizers = inputs.build_optimizers(config, task.groups)
  return Outline(task, optimizers, assumed)


def materialise(tree: PyTree, mesh: Mesh) -> PyTree:
  """Puts a tree on its devices, with small random numbers for mere shapes."""

  def place(leaf, where):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.device_put(leaf, where)
    draw = jax.jit(
      lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype),
      out_shardings=where,
    )
    return draw(jax.random.key(0))

  return jax.tree.map(place, tree, sharding.tree_shardings(tree, mesh))


def _stage1(config, assumed):
  """The configuration of the tokenizer's run, or of its preset."""
  if config.tokenizer:
    stored = workdirs.read_config(
      config.tokenizer, 'tokenizer', task='tokenizer'
    )
  else:
    preset = config.assumed.tokenizer
    if preset not in tokenizer_config.PRESETS:
      raise errors.ConfigError(
        f'assumed.tokenizer={preset!r}; wanted a preset of configs/'
        f'tokenizer.py: {", ".join(tokenizer_config.PRESETS)}'
      )
    stored = tokenizer_config.get_config(preset).to_dict()
    assumed.append(
      f'the tokenizer of configs/tokenizer.py:{preset} (tokenizer is empty)'
    )
  inputs.check_image_size(config, stored)
  return stored


def _count_classes(config, assumed) -> int:
  """Of the data, or as many as are assumed."""
  if has_data(config):
    source = inputs.open_data(config, 'train')
    if config.task == 'generator':
      generator_stage.check_classes(source, config)
    return len(source.class_names)
  count = config.assumed.num_classes
  assumed.append(f'images of {count:,} classes (data.path is empty)')
  return count


def _generator(config, assumed, num_classes) -> generator_task.GeneratorTask:
  spec = config.tokenizer or config.assumed.tokenizer
  if autoencoders.is_autoencoder(spec):
    if not config.tokenizer:
      assumed.append(f'the autoencoder {spec} (tokenizer is empty)')
    network = pretrained.load_latents(
      spec, config.data.image_size, abstract=True
    )
    codec, patch_size = (
      autoencoders.encoder_of(network),
      autoencoders.PATCH_SIZE,
    )
  else:
    stage1 = _stage1(config, assumed)
    model = tokenizer_lib.Tokenizer(
      image_size=stage1['data']['image_size'], **stage1['model']
    )
    size = model.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    codec = tokenizer.image_encoder_of(model, variables['params'])
    patch_size = model.patch_size
  encoder = encoding_builder.build_encoding(
    config, codec, patch_size, abstract=True
  )
  return generator_stage.make_generator_task(
    config, encoder, num_classes, cached=bool(config.data.cache)
  )
