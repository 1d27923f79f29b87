r"""Samples images from a generator into a folder.

  python -m launch.sample --workdir=runs/gen --tokenizer=runs/tok_big \
    --num_samples=50000 --labels=random --npz --out=samples

Several values of --guidance_scale, --guidance_low or --guidance_high are a
sweep, each with a folder of its own in --out; one compiled program serves all
that are guided:

  --guidance_scale=1.5,2,2.5 --guidance_high=0.7,0.85,1

A folder that was left is filled when the same command is given again.
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np
import tqdm
from absl import flags
from jax.experimental import multihost_utils

from launch import cli
from selfboottok_jax import errors, files, inference, pixels, trees
from selfboottok_jax.evaluation import evaluate, sample_folder
from selfboottok_jax.flow import noise
from selfboottok_jax.training import processes

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run of the generator.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer',
  None,
  'Run of the tokenizer that decodes, stage 1 or 2; or sdvae, vavae.',
)
_OUT = flags.DEFINE_string('out', None, 'New folder, or one to continue.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 64, 'Images to make.')
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  0,
  'Images between two writes, of each process; 0 is what its devices compute '
  'at a time.',
)
_DEVICE_BATCH = flags.DEFINE_integer(
  'device_batch', 0, 'Images that a device computes at a time; 0 chooses.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise.')
_LABELS = flags.DEFINE_list(
  'labels',
  ['balanced'],
  'balanced (as many of each class), random, or classes to repeat, as 0,3,7.',
)
_ROUNDING = flags.DEFINE_enum(
  'rounding', 'truncate', list(pixels.ROUNDINGS), 'Of pixels to bytes.'
)
_PNG = flags.DEFINE_bool('png', True, 'Keep an image file of each sample.')
_NPZ = flags.DEFINE_bool('npz', False, 'End with samples.npz, as for ADM.')
_SAMPLER = flags.DEFINE_string('sampler', None, 'sde, ode or heun.')
_NUM_STEPS = flags.DEFINE_integer('num_steps', None, 'Steps of the sampler.')
_LAST_STEP = flags.DEFINE_float(
  'last_step', None, "Where the SDE's last step starts."
)
_TIME_SHIFT = flags.DEFINE_float(
  'time_shift', None, 'Below 1: more steps near the noise.'
)
_CHANNELS = flags.DEFINE_integer(
  'guided_channels', None, 'The first channels are guided; 0 is all.'
)
_SCALE = flags.DEFINE_list('guidance_scale', None, '1 is without guidance.')
_CLS_SCALE = flags.DEFINE_float(
  'cls_guidance_scale', None, 'Of the class token; -1 is that of the tokens.'
)
_LOW = flags.DEFINE_list('guidance_low', None, 'Guidance from this t on.')
_HIGH = flags.DEFINE_list('guidance_high', None, 'Guidance up to this t.')
_MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Share the samples with the other processes of a pod.'
)


def main(argv) -> None:
  """Samples what the flags say."""
  del argv
  cli.require(
    workdir=_WORKDIR.value, tokenizer=_TOKENIZER.value, out=_OUT.value
  )
  for name, value, least in (
    ('num_samples', _NUM_SAMPLES.value, 1),
    ('batch_size', _BATCH_SIZE.value, 0),
    ('device_batch', _DEVICE_BATCH.value, 0),
    ('seed', _SEED.value, 0),
  ):
    if value < least:
      raise errors.ConfigError(f'--{name}={value}; wanted {least} or more')
  if _SEED.value >= 2**32:
    raise errors.ConfigError(f'--seed={_SEED.value}; wanted less than {2**32}')
  files.check_folder('out', _OUT.value)
  cli.start_jax(multihost=_MULTIHOST.value)
  generator = inference.load_generator(
    _WORKDIR.value,
    tokenizer=inference.load_tokenizer(_TOKENIZER.value),
    device_batch=_DEVICE_BATCH.value,
  )
  labels = make_labels(
    _LABELS.value or [''], _NUM_SAMPLES.value, _SEED.value, generator
  )
  out, settings = pathlib.Path(_OUT.value), asked_for(generator.sampling)
  known = {
    'generator': trees.weights_hash(generator.params),
    'tokenizer': trees.weights_hash(generator.tokenizer.params),
    'step': generator.step,
    'seed': _SEED.value,
    'rounding': _ROUNDING.value,
    'labels': ','.join(_LABELS.value),
    'device_batch': generator.device_batch,
  }
  # None makes a folder while another still looks whether it may be used.
  with processes.all_or_none():
    folders = [
      sample_folder.SampleFolder(
        out / sampling.name if len(settings) > 1 else out,
        {**known, **dataclasses.asdict(sampling)},
        labels,
        png=_PNG.value,
        npz=_NPZ.value,
      )
      for sampling in settings
    ]
  processes.check_same(
    'samples to make', '\n'.join(folder.identity for folder in folders)
  )
  for sampling, folder in zip(settings, folders, strict=True):
    fill(generator, sampling, folder)


def fill(
  generator: inference.ImageGenerator,
  sampling: inference.Sampling,
  folder: sample_folder.SampleFolder,
) -> None:
  """Makes the samples that a folder lacks, this process its share of them."""
  is_first, count = jax.process_index() == 0, len(folder.labels)
  missing = agree_on_missing(folder)
  if missing is None:
    _say(f'{count} samples are in {folder.path} already')
    return
  mine = missing[jax.process_index() :: jax.process_count()]
  changes = dataclasses.asdict(sampling)
  at_a_time = _BATCH_SIZE.value or generator.round_size
  began, pending = time.monotonic(), None
  bar = tqdm.tqdm(
    total=len(mine),
    desc=sampling.describe(),
    unit='image',
    disable=None if is_first else True,
  )
  with processes.all_or_none(), bar:
    for first in range(0, len(mine), at_a_time):
      indices = mine[first : first + at_a_time]
      images = generator.sample_uint8(
        folder.labels[indices],
        seed=_SEED.value,
        indices=indices,
        rounding=_ROUNDING.value,
        **changes,
      )
      # The devices go on while the batch before is written.
      _keep(folder, pending, bar)
      pending = indices, images
    _keep(folder, pending, bar)
  # Nobody begins with the next folder before this one is done.
  with processes.all_or_none():
    if is_first:
      rate = len(mine) * jax.process_count() / (time.monotonic() - began)
      folder.finish(generator.class_names)
  if is_first:
    left = f', {len(missing)} of them now' if len(missing) < count else ''
    _say(
      f'{count} samples in {folder.path}{left} ({rate:.3g} images/s; '
      f'{sampling.describe()})'
    )


def agree_on_missing(
  folder: sample_folder.SampleFolder,
) -> np.ndarray | None:
  """Indices of samples that a folder lacks; None where nothing is left.

  The first process looks and tells the others, who would see what these had
  written meanwhile. The folder exists afterwards.
  """
  state = np.zeros(1 + len(folder.labels), bool)
  with processes.all_or_none():
    if jax.process_index() == 0:
      folder.begin()
      state[0] = folder.is_complete
      state[1 + folder.missing()] = True
  if jax.process_count() > 1:
    state = multihost_utils.broadcast_one_to_all(state)
  return None if state[0] else np.flatnonzero(state[1:])


def _keep(folder, batch, bar) -> None:
  if batch is None:
    return
  indices, images = batch
  folder.add(indices, np.asarray(images))
  bar.update(len(indices))


def _say(text: str) -> None:
  if jax.process_index() == 0:
    cli.say(text)


def make_labels(
  given: list[str],
  count: int,
  seed: int,
  generator: inference.ImageGenerator,
) -> np.ndarray:
  """The label of every sample [count].

  'random' draws that of a sample by its index, so that a longer set begins with
  the shorter one.
  """
  if given == ['balanced']:
    return evaluate.balanced_labels(count, generator.num_classes)
  if given == ['random']:
    return np.asarray(
      noise.sample_labels(seed, np.arange(count), generator.num_classes)
    )
  chosen, last = [], generator.num_classes - 1
  for label in given:
    if not label.isdecimal() or int(label) > last:
      raise errors.ConfigError(
        f'--labels={",".join(given)}: {label!r} is no class; wanted balanced, '
        f'random or integers from 0 to {last}, as 0,{last}'
      )
    chosen.append(int(label))
  return np.resize(np.array(chosen, np.int32), count)


def asked_for(configured: inference.Sampling) -> list[inference.Sampling]:
  """The settings of the flags, over those that the generator has."""
  changes = {
    'sampler': _SAMPLER.value,
    'num_steps': _NUM_STEPS.value,
    'last_step': _LAST_STEP.value,
    'time_shift': _TIME_SHIFT.value,
    'guided_channels': _CHANNELS.value,
    'cls_guidance_scale': _CLS_SCALE.value,
  }
  changes = {k: v for k, v in changes.items() if v is not None}
  base = dataclasses.replace(configured, **changes)
  return inference.sweep(
    base,
    scales=_numbers('guidance_scale', _SCALE.value, base.guidance_scale),
    lows=_numbers('guidance_low', _LOW.value, base.guidance_low),
    highs=_numbers('guidance_high', _HIGH.value, base.guidance_high),
  )


def _numbers(name: str, given: list[str] | None, default: float) -> list[float]:
  if given is None:
    return [float(default)]
  try:
    values = [float(text) for text in given]
  except ValueError as error:
    raise errors.ConfigError(
      f'--{name}={",".join(given)}; wanted a number, or several with commas '
      'between'
    ) from error
  if not values or len(set(values)) < len(values):
    raise errors.ConfigError(
      f'--{name}={",".join(given)}; wanted one or more different numbers'
    )
  return values


if __name__ == '__main__':
  cli.run(main)
