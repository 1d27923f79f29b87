"""Times a training step, its loop and its data on this machine.

  python -m launch.benchmark --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS

Works without data and without a tokenizer: model and loop are then timed on
made-up images, and what was assumed is printed. Prints a table and, as the last
line, JSON. Step and loop take turns, so that their ratio holds on a busy
machine; many short rounds (--rounds=40 --steps=4) tell it best.
"""

import contextlib
import datetime
import json
import os
import platform
import resource
import statistics
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from launch import cli
from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import cost, tables
from selfboottok_jax.stages import checks, dry_run, inputs, timing
from selfboottok_jax.stages.programs import (
  TrainPrograms,
  describe_devices,
  no_compilation_cache,
)
from selfboottok_jax.training import sharding

_CONFIG = cli.define_config()
_STEPS = flags.DEFINE_integer('steps', 20, 'Updates in a round.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds; medians are reported.')
_OUT = flags.DEFINE_string('out', None, 'File to write the JSON to as well.')


def main(argv) -> None:
  """Measures what the flags say."""
  del argv
  cli.require(config=_CONFIG.value)
  for name, value in (('steps', _STEPS.value), ('rounds', _ROUNDS.value)):
    if value < 1:
      raise errors.ConfigError(f'--{name}={value}; wanted 1 or more')
  if _OUT.value:
    files.check_folder('out', os.path.dirname(_OUT.value) or '.')
    if os.path.isdir(_OUT.value):
      raise errors.ConfigError(f'--out={_OUT.value} is a folder; wanted a file')
  cli.start_jax()
  record, notes = measure(_CONFIG.value, _STEPS.value, _ROUNDS.value)
  cli.say('\n'.join(notes))
  rows = [
    {'measure': name, 'value': _shown(value)} for name, value in record.items()
  ]
  cli.say(tables.table(rows, ['measure', 'value']))
  line = json.dumps(record)
  cli.say(line)
  if _OUT.value:
    try:
      files.write_atomically(_OUT.value, line.encode() + b'\n')
    except OSError as error:
      raise errors.ConfigError(
        f'--out={_OUT.value} cannot be written ({error.strerror}); choose '
        'another file'
      ) from error


def measure(
  config: ml_collections.ConfigDict, steps: int, rounds: int
) -> tuple[dict[str, Any], list[str]]:
  """Everything measured, by name; and what was assumed, in sentences.

  Seconds, bytes and images per second are medians over the rounds; a measure
  that this machine or the configuration does not allow is None.
  """
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  checks.check(config)
  source = None
  if inputs.has_data(config):
    source = inputs.open_data(config, 'train')
  sketch = dry_run.abstract_task(config)
  began = time.monotonic()
  step_fn = TrainPrograms(config, sketch.task, mesh)
  trace_seconds = time.monotonic() - began
  # The last phase: everything is on.
  first = max(sketch.task.milestones)
  with no_compilation_cache():
    step_fn.compile(first)
  card = step_fn.card()
  frozen = dry_run.materialise(sketch.task.frozen, mesh)
  state = step_fn.init()
  state = state.replace(step=_scalar(first, state.step))
  timed = timing.Timed(config, step_fn, frozen, mesh, steps)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    photos = None
    if source is not None:
      photos = inputs.train_batches(config, source, start_step=0)
      stack.enter_context(contextlib.closing(photos))
    seconds = timing.measure(timed, state, rounds, photos)
  record = _record(config, mesh, card, seconds) | {
    'trace_seconds': trace_seconds
  }
  notes = [f'assumed: {line}' for line in sketch.assumed]
  if source is None:
    notes.append('data rates not measured: data.path is empty')
  return record, notes


def _record(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  card: cost.Card,
  seconds: timing.Seconds,
) -> dict[str, Any]:
  """Everything by its name."""
  step_seconds = statistics.median(seconds.model)
  overheads = [
    inside / bare - 1
    for inside, bare in zip(seconds.loop, seconds.model, strict=True)
  ]
  batch = config.data.batch_size
  memory, memory_of = _peak_memory()
  per_second = card.flops.model * batch / step_seconds
  peak = cost.peak_flops(jax.devices()[0].device_kind)
  return {
    'config': _config_name(),
    'task': config.task,
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'devices': describe_devices(mesh),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'batch_size': batch,
    'dtype': config.model.dtype,
    'attention': config.model.attention,
    'remat': config.model.remat,
    'unroll': config.model.unroll,
    'trained_parameters': card.parameters(trained=True),
    'frozen_parameters': card.parameters(trained=False),
    'gflops_per_image': card.flops.model / 1e9,
    'compile_seconds': card.compile_seconds,
    'step_seconds': step_seconds,
    'step_seconds_least': min(seconds.model),
    'step_seconds_most': max(seconds.model),
    'images_per_second': batch / step_seconds,
    'loop_step_seconds': statistics.median(seconds.loop),
    'loop_overhead': statistics.median(overheads),
    'loop_overhead_quartiles': _quartiles(overheads),
    'data_images_per_second': _rate(batch, seconds.data),
    'training_images_per_second': _rate(batch, seconds.training),
    'tflops_per_second': per_second / 1e12,
    'mfu': peak and per_second / (peak * mesh.size),
    'mfu_of': peak and f'{peak / 1e12:.0f} TFLOP/s, dense bfloat16',
    'step_memory_bytes': card.memory.total,
    'peak_memory_bytes': memory,
    'peak_memory_of': memory_of,
  }


def _shown(value: Any) -> str:
  """A measure for people; nothing where it was not taken."""
  if isinstance(value, list):
    return ' to '.join(tables.number(item) for item in value)
  return '' if value is None else tables.number(value)


def _rate(batch: int, seconds: list[float]) -> float | None:
  """Images per second, where there was something to time."""
  return batch / statistics.median(seconds) if seconds else None


def _quartiles(values: list[float]) -> list[float] | None:
  """The first and the third; None of a single value."""
  if len(values) < 2:
    return None
  first, _, third = statistics.quantiles(values, n=4)
  return [first, third]


def _scalar(value: int, like: jax.Array) -> jax.Array:
  return jax.device_put(np.asarray(value, like.dtype), like.sharding)


def _peak_memory() -> tuple[int, str]:
  """Bytes at the worst moment so far: of a device, else of the process."""
  stats = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'], 'device'
  unit = 1 if sys.platform == 'darwin' else 1024
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return used * unit, 'process'


def _config_name() -> str:
  """The configuration's file and preset, and what overrides it."""
  flag = flags.FLAGS['config']
  overrides = config_flags.get_override_values(flag)
  changed = [f'config.{key}={value}' for key, value in overrides.items()]
  return ' '.join([config_flags.get_config_filename(flag), *changed])


if __name__ == '__main__':
  cli.run(main, continues=False)
