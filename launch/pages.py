"""What the pages about runs are made of."""

import os
import pathlib
import platform
from importlib import metadata

import jax
import numpy as np

from selfboottok_jax import inference
from selfboottok_jax.evaluation import content, evaluate
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import logging as logging_lib

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'grain')


def run_of(workdir: pathlib.Path, name: str, what: str) -> content.Run:
  """A run of a page; `what` names the flag that gave it, for errors."""
  run = checkpointing.read_run(str(workdir), what=what)
  path = workdir / logging_lib.METRICS
  return content.Run(
    name,
    str(workdir),
    run.config['task'],
    run.step,
    logging_lib.seconds(path) if path.exists() else 0,
    path if path.exists() else None,
  )


def samples_of(
  generator: inference.ImageGenerator,
  per_class: int,
  *,
  seed: int,
  decoded_by: str,
  most_classes: int = 10,
) -> content.Samples:
  """Samples of each class, or of classes that are spread evenly over all."""
  count = min(most_classes, generator.num_classes)
  chosen = np.arange(count) * generator.num_classes // count
  labels = np.tile(chosen.astype(np.int32), per_class)
  images = np.concatenate(
    list(evaluate.sample_batches(generator, labels, len(labels), seed=seed))
  )
  classes = {
    generator.class_names[label]: images[index::count]
    for index, label in enumerate(chosen)
  }
  return content.Samples(
    classes,
    f'{generator.sampling.describe()}; seed {seed}, step {generator.step}, EMA '
    f'weights, decoded by {decoded_by}; unselected',
  )


def environment() -> dict[str, object]:
  """Versions, devices, cores."""
  return {
    'Python': platform.python_version(),
    **{package: metadata.version(package) for package in _PACKAGES},
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'CPU cores': os.cpu_count(),
  }
