"""What a training would cost, before it costs anything."""

import copy
import json

import jax
import ml_collections

from selfboottok_jax import data
from selfboottok_jax.evaluation import cost
from selfboottok_jax.stages import inputs, outline, registry
from selfboottok_jax.stages.programs import (
  TrainPrograms,
  describe_devices,
  no_compilation_cache,
)
from selfboottok_jax.training import sharding


def describe(config: ml_collections.ConfigDict) -> str:
  """The cost card of a training, as a table and as one JSON line.

  Nothing is allocated, fetched or written. Data or a tokenizer that the
  configuration does not name are assumed, and said to be; what it names is
  looked for. A workdir and all parameters are left to the training.
  """
  lines = []
  if config.model.attention == 'cudnn' and jax.default_backend() != 'gpu':
    config = copy.deepcopy(config)
    config.model.attention = 'xla'
    lines.append('assumed: attention of xla (cudnn needs a GPU)')
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  registry.check(config)
  sketch = outline.outline(config)
  lines += [f'assumed: {line}' for line in sketch.assumed]
  if outline.has_data(config):
    source = inputs.open_data(config, 'train')
    lines.append(f'data: {data.describe(source)}')
  programs = TrainPrograms(config, sketch.task, sketch.optimizers, mesh)
  with no_compilation_cache():
    programs.compile(max(sketch.task.milestones))
  card = programs.card()
  return '\n'.join(
    [
      f'{config.task} on {describe_devices(mesh)}, batch '
      f'{config.data.batch_size}',
      *lines,
      '',
      cost.table(card),
      json.dumps(card.to_dict()),
    ]
  )
