"""Samples images from a generator into a folder of PNG files.

python -m launch.sample --workdir=runs/gen --tokenizer=runs/tok_big \
    --num_samples=64 --out=samples
"""

import pathlib

import numpy as np
import tqdm
from absl import flags

from launch import cli
from selfboottok_jax import errors, inference
from selfboottok_jax.evaluation import evaluate, pictures

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run of the generator.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'Run of the tokenizer that decodes, stage 1 or 2.'
)
_OUT = flags.DEFINE_string('out', None, 'New or empty folder for the images.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 64, 'Images to make.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Images at a time.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise.')
_LABELS = flags.DEFINE_list(
  'labels', None, 'Classes to repeat, as 0,3,7; all by default.'
)
_SAMPLER = flags.DEFINE_string('sampler', None, 'sde, ode or heun.')
_NUM_STEPS = flags.DEFINE_integer('num_steps', None, 'Steps of the sampler.')
_SCALE = flags.DEFINE_float('guidance_scale', None, '1 is without guidance.')
_LOW = flags.DEFINE_float('guidance_low', None, 'Guidance from this t on.')
_HIGH = flags.DEFINE_float('guidance_high', None, 'Guidance up to this t.')


def main(argv) -> None:
  """Samples what the flags say."""
  del argv
  cli.require(
    workdir=_WORKDIR.value, tokenizer=_TOKENIZER.value, out=_OUT.value
  )
  for name, value in (
    ('num_samples', _NUM_SAMPLES.value),
    ('batch_size', _BATCH_SIZE.value),
  ):
    if value < 1:
      raise errors.ConfigError(f'--{name}={value}; wanted 1 or more')
  out = pathlib.Path(_OUT.value)
  cli.check_folder('out', out)
  if out.exists() and any(out.iterdir()):
    raise errors.UserError(
      f'--out={out} is not empty; choose a new folder, nothing is overwritten'
    )
  cli.start_jax()
  generator = inference.load_generator(
    _WORKDIR.value, tokenizer=inference.load_tokenizer(_TOKENIZER.value)
  )
  labels = _labels(generator)
  images = []
  batches = evaluate.sample_batches(
    generator,
    _NUM_SAMPLES.value,
    _BATCH_SIZE.value,
    labels=labels,
    seed=_SEED.value,
    **_sampling(generator),
  )
  for batch in tqdm.tqdm(
    batches, total=-(-len(labels) // _BATCH_SIZE.value), disable=None
  ):
    out.mkdir(parents=True, exist_ok=True)
    for image in batch:
      index = len(images)
      name = f'{index:06d}_class{labels[index]:04d}.png'
      pictures.save_png(out / name, image)
      images.append(image)
  columns = min(len(generator.class_names), len(images), 10)
  shown = pictures.enlarge(np.stack(images[:100]))
  pictures.save_png(out / 'grid.png', pictures.grid(shown, columns))
  cli.say(f'{len(images)} images and grid.png in {out}')


def _labels(generator: inference.ImageGenerator) -> np.ndarray:
  """The label of every sample: the chosen classes over and over."""
  if _LABELS.value is None:
    return evaluate.balanced_labels(_NUM_SAMPLES.value, generator.num_classes)
  chosen, last = [], generator.num_classes - 1
  for label in _LABELS.value or ['']:
    if not label.isdecimal() or int(label) > last:
      raise errors.ConfigError(
        f'--labels={",".join(_LABELS.value)}: {label!r} is no class; wanted '
        f'integers from 0 to {last}, as 0,{last}'
      )
    chosen.append(int(label))
  return np.resize(np.array(chosen, np.int32), _NUM_SAMPLES.value)


def _sampling(generator: inference.ImageGenerator) -> dict:
  """The generator's settings, with what the flags change."""
  settings = evaluate.sampling_of(generator)
  low, high = settings['guidance_interval']
  changes = {
    'sampler': _SAMPLER.value,
    'num_steps': _NUM_STEPS.value,
    'guidance_scale': _SCALE.value,
  }
  settings |= {k: v for k, v in changes.items() if v is not None}
  settings['guidance_interval'] = (
    low if _LOW.value is None else _LOW.value,
    high if _HIGH.value is None else _HIGH.value,
  )
  return settings


if __name__ == '__main__':
  cli.run(main)
