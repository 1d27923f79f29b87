"""Memory and arithmetic of a training, from shapes alone, before it runs."""

import copy
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import (
  data,
  errors,
  presets,
  pretrained,
  sizes,
  stages,
)
from selfboottok_jax.evaluation import cost
from selfboottok_jax.inference import tokenizer as inference_tokenizer
from selfboottok_jax.models import layers
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.presets import tokenizer as tokenizer_presets
from selfboottok_jax.pretrained import autoencoders
from selfboottok_jax.stages import (
  checks,
  frozen_encoders,
  generator,
  generator_stage,
  inputs,
  programs,
  tokenizer_stage,
)
from selfboottok_jax.training import checkpointing, sharding


@dataclasses.dataclass(frozen=True)
class AbstractTask:
  """A task without data, to be traced, sized and timed.

  Attributes:
    task: as trained; frozen networks, and a tokenizer that is not named, have
      shapes in place of parameters.
    assumed: a line for everything that was supposed because it was not given.
  """

  task: stages.Task
  assumed: list[str]


def describe(
  config: ml_collections.ConfigDict, *, json_only: bool = False
) -> str:
  """The cost card of a training, as a table and a line of JSON.

  Nothing is allocated, fetched or written. Data or a tokenizer that the
  configuration does not name are assumed, and listed; those that it names must
  exist. A workdir and the tokenizer's parameters are left to the training.

  Args:
    config: of the training.
    json_only: leave out the table.
  """
  lines = []
  attention = config.model.attention
  needed = layers.PLATFORMS.get(attention)
  if needed and jax.default_backend() != needed:
    config = copy.deepcopy(config)
    config.model.attention = 'xla'
    where = f'{attention} needs a {needed.upper()}'
    lines.append(f'assumed: attention of xla ({where})')
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  checks.check(config)
  abstract = abstract_task(config)
  lines += [f'assumed: {line}' for line in abstract.assumed]
  if inputs.has_data(config):
    source = inputs.open_data(config, 'train')
    lines.append(f'data: {data.describe(source)}')
  step_fn = programs.TrainPrograms(config, abstract.task, mesh)
  with programs.no_compilation_cache():
    # In the last phase every loss is on.
    step_fn.compile(max(abstract.task.milestones))
  card = step_fn.card()
  if json_only:
    return json.dumps(card.to_dict())
  return '\n'.join(
    [
      f'{config.task} on {programs.describe_devices(mesh)}, batch '
      f'{config.data.batch_size}',
      *lines,
      '',
      cost.table(card),
      json.dumps(card.to_dict()),
    ]
  )


def abstract_task(
  config: ml_collections.ConfigDict, stage1: dict[str, Any] | None = None
) -> AbstractTask:
  """The task of a configuration; assumes and lists what is not given.

  Args:
    config: of the training.
    stage1: the configuration of its tokenizer, in place of that of a run.
  """
  assumed: list[str] = []
  num_classes = _count_classes(config, assumed)
  task: stages.Task
  if config.task == 'tokenizer':
    task = tokenizer_stage.make_tokenizer_task(config, abstract=True)
  elif config.task == 'scaling':
    stage1 = stage1 or _stage1(config, assumed)
    task = tokenizer_stage.make_scaling_task(config, stage1, abstract=True)
  else:
    task = _generator_task(config, assumed, num_classes, stage1)
  return AbstractTask(task, assumed)


def materialise(tree: PyTree, mesh: Mesh) -> PyTree:
  """Places a tree on its devices, with random numbers in place of shapes."""

  def place(leaf: Any, where: jax.sharding.Sharding) -> jax.Array:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.device_put(leaf, where)
    # Drawn where they will lie: the whole leaf may not fit one device.
    draw = jax.jit(
      lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype),
      out_shardings=where,
    )
    return draw(jax.random.key(0))

  return jax.tree.map(place, tree, sharding.tree_shardings(tree, mesh))


def _stage1(
  config: ml_collections.ConfigDict, assumed: list[str]
) -> dict[str, Any]:
  """The configuration of the tokenizer's run, or of an assumed preset."""
  if config.tokenizer:
    stored = checkpointing.read_config(
      config.tokenizer, 'tokenizer', task='tokenizer'
    )
  else:
    preset = config.assumed.tokenizer
    if preset not in tokenizer_presets.PRESETS:
      raise errors.ConfigError(
        f'assumed.tokenizer={preset!r}; wanted a preset of configs/'
        f'tokenizer.py: {", ".join(tokenizer_presets.PRESETS)}'
      )
    stored = presets.get_config(f'tokenizer:{preset}').to_dict()
    assumed.append(
      f'the tokenizer of configs/tokenizer.py:{preset} (tokenizer is empty)'
    )
  inputs.check_image_size(config, stored)
  return stored


def _count_classes(
  config: ml_collections.ConfigDict, assumed: list[str]
) -> int:
  """The number of classes of the data, or the assumed number."""
  if inputs.has_data(config):
    source = inputs.open_data(config, 'train')
    return len(generator_stage.class_names(source))
  count = config.assumed.num_classes
  assumed.append(f'images of {count:,} classes (data.path is empty)')
  return count


def _generator_task(
  config: ml_collections.ConfigDict,
  assumed: list[str],
  num_classes: int,
  stage1: dict[str, Any] | None,
) -> generator.GeneratorTask:
  spec = config.tokenizer or config.assumed.tokenizer
  if stage1 is None and autoencoders.is_autoencoder(spec):
    if not config.tokenizer:
      assumed.append(f'the autoencoder {spec} (tokenizer is empty)')
    network = pretrained.load_latents(
      spec, sizes.canonical(config.data.image_size), abstract=True
    )
    tokenizer = autoencoders.encoder_of(network)
    patch_size = autoencoders.PATCH_SIZE
  else:
    stage1 = stage1 or _stage1(config, assumed)
    model = tokenizer_lib.Tokenizer(
      image_size=sizes.canonical(stage1['data']['image_size']),
      **stage1['model'],
    )
    size = sizes.pair(model.image_size)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    tokenizer = inference_tokenizer.image_encoder_of(model, variables['params'])
    patch_size = model.patch_size
  encoders = frozen_encoders.from_config(
    config, tokenizer, patch_size, abstract=True
  )
  cached = bool(config.data.cache)
  if config.assumed.cache and not cached:
    assumed.append('a cache of codes (data.cache is empty)')
    cached = True
  return generator_stage.make_generator_task(
    config, encoders, num_classes, cached=cached
  )
