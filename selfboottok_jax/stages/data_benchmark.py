"""Benchmark of the way of pictures to a training, and what bounds its speed."""

import contextlib
import dataclasses
import datetime
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from selfboottok_jax import data, errors
from selfboottok_jax.data import cores, pipeline
from selfboottok_jax.stages import benchmark, dry_run, inputs
from selfboottok_jax.stages.programs import TrainPrograms, describe_devices
from selfboottok_jax.training import sharding

# Pictures that are timed one by one in a round, spread over the data.
_SAMPLE = 128
# Processes of the comparison, where a training would have none.
_WORKERS = 2


@dataclasses.dataclass
class _Seconds:
  """Seconds by part, one number for each round.

  Attributes:
    decoding: of a core, to read a picture and decode it; a record of a cache.
    resizing: of a core, to resize, crop and mirror it.
    batching: of a core, to put it into a batch.
    transfer: to bring a batch to the devices.
    pipeline: for a batch of the pipeline, as the configuration has it.
    threads: the same with threads alone.
    workers: the same with processes.
    model: for a compiled step.
    training: for a step of the loop on batches of the pipeline.
    waiting: of these, in which the next batch was not there yet.
  """

  decoding: list[float] = dataclasses.field(default_factory=list)
  resizing: list[float] = dataclasses.field(default_factory=list)
  batching: list[float] = dataclasses.field(default_factory=list)
  transfer: list[float] = dataclasses.field(default_factory=list)
  pipeline: list[float] = dataclasses.field(default_factory=list)
  threads: list[float] = dataclasses.field(default_factory=list)
  workers: list[float] = dataclasses.field(default_factory=list)
  model: list[float] = dataclasses.field(default_factory=list)
  training: list[float] = dataclasses.field(default_factory=list)
  waiting: list[float] = dataclasses.field(default_factory=list)


def measure(
  config: ml_collections.ConfigDict, steps: int, rounds: int
) -> tuple[dict[str, Any], list[str]]:
  """Times decoding, cropping, batching, transfer, the pipeline and the step.

  Args:
    config: of a training; it must say where images are.
    steps: updates, or batches, in a round.
    rounds: number of rounds; results are medians over them.

  Returns:
    Everything measured, by name, and sentences on what was assumed and found.

  Raises:
    UserError: a configuration or images that cannot be used.
  """
  if not inputs.has_data(config):
    raise errors.ConfigError(
      '--data times the reading of images, and data.path is empty; name them, '
      'as in --config.data.path=PHOTOS'
    )
  mesh = benchmark.check_mesh(config)
  source = inputs.open_data(config, 'train')
  sketch = dry_run.abstract_task(config)
  step_fn = TrainPrograms(config, sketch.task, mesh)
  clock, state = benchmark.start(config, sketch, step_fn, mesh, steps)
  seconds = _Seconds()
  with jax.set_mesh(mesh):
    # Warm caches and allocators before the clock starts.
    state, _ = clock.model(state)
    _time_parts(config, source, mesh, _Seconds())
    for _ in range(rounds):
      _time_parts(config, source, mesh, seconds)
      state, taken = clock.model(state)
      seconds.model.append(taken)
      for kind, options in _kinds(config, source).items():
        with _batches(config, source, options) as batches:
          getattr(seconds, kind).append(clock.data(batches))
          if kind != 'pipeline':
            continue
          timed = _Timed(batches)
          state, taken = clock.loop(state, timed)
          seconds.training.append(taken)
          seconds.waiting.append(timed.waited / steps)
  record = _record(config, mesh, source, seconds)
  notes = [f'assumed: {line}' for line in sketch.assumed]
  return record, [*notes, _explain(record)]


class _Timed(Iterator[dict[str, np.ndarray]]):
  """Batches; notes how long one was waited for."""

  def __init__(self, batches: data.TrainBatches) -> None:
    self._batches, self.waited = batches, 0.0

  def __next__(self) -> dict[str, np.ndarray]:
    began = time.monotonic()
    batch = next(self._batches)
    self.waited += time.monotonic() - began
    return batch


def _kinds(
  config: ml_collections.ConfigDict, source: data.Source
) -> dict[str, dict[str, int]]:
  """The pipelines that are compared: their numbers of threads and workers."""
  sharing = inputs.count_sharing_cores()
  threads, workers = cores.choose(
    source,
    config.data.num_threads,
    config.data.num_workers,
    shared_by=sharing,
  )
  alone, _ = cores.choose(source, num_workers=0, shared_by=sharing)
  most = max(1, min(_WORKERS, cores.count_cores(sharing)))
  return {
    'pipeline': {'num_threads': threads, 'num_workers': workers},
    'threads': {'num_threads': alone, 'num_workers': 0},
    # One thread each: so many decode at a time as there are processes.
    'workers': {'num_threads': 1, 'num_workers': workers or most},
  }


@contextlib.contextmanager
def _batches(
  config: ml_collections.ConfigDict,
  source: data.Source,
  options: dict[str, int],
) -> Iterator[data.TrainBatches]:
  changed = config.copy_and_resolve_references()
  changed.data.update(options)
  with contextlib.closing(
    inputs.train_batches(changed, source, start_step=0)
  ) as batches:
    yield batches


def _time_parts(
  config: ml_collections.ConfigDict,
  source: data.Source,
  mesh: Mesh,
  seconds: _Seconds,
) -> None:
  """Times what is done to a picture, each part alone in one thread.

  Up to the batch it is the time of a core that counts: it is the same on a busy
  machine, and waiting for a disk is not in it.
  """
  draw = pipeline.train_rows(
    source,
    config.data.image_size,
    max_scale=None,
    flip=config.data.flip,
    random_crop=config.data.random_crop,
  )
  local = config.data.batch_size // jax.process_count()
  count = min(_SAMPLE, len(source))
  rng = np.random.default_rng(0)
  rows, decoding, resizing = [], 0.0, 0.0
  for index in (np.arange(count) * len(source) // count).tolist():
    began = time.thread_time()
    if isinstance(draw, pipeline.TrainPictures):
      picture = pipeline.read(source, index)
      decoded = time.thread_time()
      rows.append(draw.transform(picture, rng))
    else:
      rows.append(draw(index, rng))
      decoded = time.thread_time()
    decoding += decoded - began
    resizing += time.thread_time() - decoded
  seconds.decoding.append(decoding / count)
  seconds.resizing.append(resizing / count)
  whole = [rows[i % count] for i in range(local)]
  began = time.thread_time()
  batch = pipeline.stack(whole)
  seconds.batching.append((time.thread_time() - began) / local)
  began = time.monotonic()
  jax.block_until_ready(sharding.put_batch(batch, mesh))
  seconds.transfer.append(time.monotonic() - began)


def _record(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  source: data.Source,
  seconds: _Seconds,
) -> dict[str, Any]:
  """All measures by name: medians over the rounds."""
  each = {
    field.name: statistics.median(getattr(seconds, field.name))
    for field in dataclasses.fields(seconds)
  }
  kinds = _kinds(config, source)
  batch, local = config.data.batch_size, config.data.batch_size
  local //= jax.process_count()
  count = cores.count_cores(inputs.count_sharing_cores())
  work = each['decoding'] + each['resizing']
  waits = [
    waited / step
    for waited, step in zip(seconds.waiting, seconds.training, strict=True)
  ]
  return {
    'task': config.task,
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'devices': describe_devices(mesh),
    'jax': jax.__version__,
    'data': repr(source),
    'images': len(source),
    'image_size': config.data.image_size,
    'batch_size': batch,
    'cores': count,
    'num_threads': kinds['pipeline']['num_threads'],
    'num_workers': kinds['pipeline']['num_workers'],
    'decode_crop_images_per_second_per_core': 1 / work,
    'images_per_second_per_core': local / each['pipeline'] / count,
    'images_per_second': batch / each['pipeline'],
    'threads_images_per_second': batch / each['threads'],
    'threads': kinds['threads']['num_threads'],
    'workers_images_per_second': batch / each['workers'],
    'workers': kinds['workers']['num_workers'],
    'model_images_per_second': batch / each['model'],
    'training_images_per_second': batch / each['training'],
    'data_wait': statistics.median(waits),
    'decoding_microseconds': 1e6 * each['decoding'],
    'resizing_microseconds': 1e6 * each['resizing'],
    'batching_microseconds': 1e6 * each['batching'],
    'transfer_milliseconds': 1e3 * each['transfer'],
    'model_milliseconds': 1e3 * each['model'],
    'pipeline_milliseconds': 1e3 * each['pipeline'],
    'bound_by': bound_by(each),
  }


def bound_by(each: dict[str, float]) -> str:
  """What a training waits for, from the seconds of `_Seconds`.

  Pipeline, transfers and steps overlap, so the slowest of the three sets the
  pace. Within the pipeline it is the part that takes most of a core's time.
  """
  pace = {name: each[name] for name in ('model', 'transfer', 'pipeline')}
  slowest = max(pace, key=lambda name: pace[name])
  if slowest == 'pipeline':
    parts = {n: each[n] for n in ('decoding', 'resizing', 'batching')}
    slowest = max(parts, key=lambda name: parts[name])
  return slowest


# What helps, by what bounds.
_ADVICE = {
  'model': "the model's step: faster data would change nothing",
  'transfer': 'transfers to the devices',
  'decoding': 'reading and decoding: prepare a copy with smaller pictures '
  '(launch.prepare --resize), or give more cores',
  'resizing': 'resizing: prepare a copy with smaller pictures '
  '(launch.prepare --resize), or give more cores',
  'batching': 'putting rows into batches: give more cores',
}


def _explain(record: dict[str, Any]) -> str:
  """One sentence on what the numbers say."""
  return (
    f'bound by {_ADVICE[record["bound_by"]]}; the pipeline brings '
    f'{record["images_per_second"]:.0f} images/s '
    f'({record["images_per_second_per_core"]:.0f} a core of {record["cores"]}),'
    f' the step alone takes {record["model_images_per_second"]:.0f}, and '
    f'{record["data_wait"]:.1%} of a training is waiting for data'
  )
