r"""Samples images from a generator into a folder.

  python -m launch.sample --workdir=runs/gen --tokenizer=runs/tok_big \
    --num_samples=50000 --labels=random --npz --out=samples

Several values of --guidance_scale, --guidance_low or --guidance_high are a
sweep, each setting with a folder of its own in --out; one compiled program
serves all guided ones:

  --guidance_scale=1.5,2,2.5 --guidance_high=0.7,0.85,1

A folder that was left unfinished is filled when the same command is given
again. With --score_against samples are scored and not kept:

  --score_against=VIRTUAL_imagenet256_labeled.npz --metrics=fid,is \
    --out=scores.json
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from launch import cli
from selfboottok_jax import errors, files, inference, pixels
from selfboottok_jax.evaluation import evaluate, metrics, sample_folder
from selfboottok_jax.inference import sampling
from selfboottok_jax.presets import evaluate as evaluate_presets
from selfboottok_jax.stages import score

FLAGS = cli.Flags()
_WORKDIR = FLAGS.string('workdir', '', 'Run of the generator.')
_TOKENIZER = FLAGS.string(
  'tokenizer',
  '',
  'Run of the tokenizer that decodes, stage 1 or 2; or sdvae, vavae.',
)
_OUT = FLAGS.string(
  'out', '', 'New folder, or one to continue; with --score_against a file.'
)
_SCORE_AGAINST = FLAGS.string(
  'score_against',
  '',
  'Keep no samples, but score them against photographs or an .npz file.',
)
_METRICS = FLAGS.strings('metrics', [], 'Scores, see launch.evaluate.')
_NUM_SAMPLES = FLAGS.integer('num_samples', 64, 'Images to make.')
_BATCH_SIZE = FLAGS.integer(
  'batch_size',
  0,
  'Images between two writes, of each process; 0 is as many as its devices '
  'compute at a time.',
)
_DEVICE_BATCH = FLAGS.integer(
  'device_batch',
  0,
  'Images that a device computes at a time; 0 is what its memory allows, and '
  'for a folder that was begun what it was begun with.',
)
_SEED = FLAGS.integer('seed', 0, 'Seed of the noise.')
_LABELS = FLAGS.strings(
  'labels',
  ['balanced'],
  'balanced (equally many of each class), random, or classes to repeat, by '
  'label or name, as 0,3,tench.',
)
_ROUNDING = FLAGS.choice(
  'rounding', 'truncate', pixels.ROUNDINGS, 'From pixels to bytes.'
)
_PNG = FLAGS.switch('png', True, 'Write an image file of each sample.')
_NPZ = FLAGS.switch('npz', False, 'End with samples.npz, as for ADM.')
_SAMPLER = FLAGS.string('sampler', '', 'sde, ode or heun.')
# A flag that is not given (None) leaves the setting as it was trained.
_NUMBERS = (
  FLAGS.optional_integer('num_steps', 'Steps of the sampler.'),
  FLAGS.optional_number('last_step', "Where the SDE's last step starts."),
  FLAGS.optional_number('time_shift', 'Below 1: more steps near the noise.'),
  FLAGS.optional_integer(
    'guided_channels', 'Guide the first channels only; 0 is all.'
  ),
  FLAGS.optional_number(
    'cls_guidance_scale', 'Scale of the class token; -1 is that of the tokens.'
  ),
)
_SCALE = FLAGS.strings('guidance_scale', [], '1 is without guidance.')
_LOW = FLAGS.strings('guidance_low', [], 'Guidance from this t on.')
_HIGH = FLAGS.strings('guidance_high', [], 'Guidance up to this t.')
_MULTIHOST = FLAGS.switch(
  'multihost', False, 'Share the samples with the other processes of a pod.'
)


def main() -> None:
  """Fills a folder of samples for each setting."""
  cli.require(
    workdir=_WORKDIR.value, tokenizer=_TOKENIZER.value, out=_OUT.value
  )
  cli.check_least(_NUM_SAMPLES, 1)
  for flag in (_BATCH_SIZE, _DEVICE_BATCH, _SEED):
    cli.check_least(flag, 0)
  if _SEED.value >= 2**32:
    raise errors.ConfigError(f'--seed={_SEED.value}; wanted less than {2**32}')
  if _SCORE_AGAINST.value:
    for flag in (_PNG, _NPZ):
      if flag.present:
        raise errors.ConfigError(
          f'--{flag.name} with --score_against, which keeps no samples; leave '
          'it out'
        )
    score.check_out(_OUT.value)
  elif _METRICS.present:
    raise errors.ConfigError(
      '--metrics without --score_against; wanted both, or samples alone'
    )
  else:
    files.check_folder('out', _OUT.value)
  if _METRICS.present:
    metrics.parse(_METRICS.value)
  cli.start_jax(multihost=_MULTIHOST.value)
  generator = inference.load_generator(
    _WORKDIR.value,
    tokenizer=_TOKENIZER.value,
    device_batch=_DEVICE_BATCH.value,
  )
  sweep = _settings(generator.sampling)
  labels = sample_folder.make_labels(
    _LABELS.value or [''],
    _NUM_SAMPLES.value,
    _SEED.value,
    generator.class_names or [str(i) for i in range(generator.num_classes)],
  )
  if _SCORE_AGAINST.value:
    _score(generator, sweep, labels)
    return
  filled = sample_folder.sample_folders(
    generator,
    sweep,
    _OUT.value,
    labels,
    labels_as=','.join(_LABELS.value),
    batch_size=_BATCH_SIZE.value,
    seed=_SEED.value,
    rounding=_ROUNDING.value,
    png=_PNG.value,
    npz=_NPZ.value,
    by_memory=not _DEVICE_BATCH.value,
  )
  for sentence in filled:
    if jax.process_index() == 0:
      cli.say(sentence)


def _score(
  generator: inference.ImageGenerator,
  sweep: Sequence[inference.Sampling],
  labels: Int[np.ndarray, ' n'],
) -> None:
  """Scores samples that nobody keeps."""
  if not _DEVICE_BATCH.value:
    generator = generator.with_device_batch(
      sample_folder.fit_device_batch(
        generator, sweep, len(labels), _BATCH_SIZE.value
      )
    )
  config = evaluate_presets.get_config()
  config.data.batch_size = _BATCH_SIZE.value or (
    generator.round_size * jax.process_count()
  )
  found = score.score_generator(
    config,
    _WORKDIR.value,
    generator,
    sweep,
    labels,
    labels_as=','.join(_LABELS.value),
    request=score.Request(_METRICS.value, _SCORE_AGAINST.value),
    seed=_SEED.value,
    rounding=_ROUNDING.value,
  )
  score.write(found, _OUT.value, _WORKDIR.value)
  if jax.process_index() == 0:
    cli.say(evaluate.as_text(found))


def _settings(configured: inference.Sampling) -> list[inference.Sampling]:
  """The settings of the flags, in place of the configured ones."""
  changes: dict[str, Any] = {
    f.name: f.value for f in _NUMBERS if f.value is not None
  }
  if _SAMPLER.present:
    changes['sampler'] = _SAMPLER.value
  base = dataclasses.replace(configured, **changes)
  return sampling.sweep(
    base,
    scales=_values(_SCALE, base.guidance_scale),
    lows=_values(_LOW, base.guidance_low),
    highs=_values(_HIGH, base.guidance_high),
  )


def _values(flag: cli.Holder[cli.Texts], default: float) -> list[float]:
  """The numbers of a flag, or the default if it was not given."""
  if not flag.present:
    return [float(default)]
  given = ','.join(flag.value)
  try:
    values = [float(text) for text in flag.value]
  except ValueError as error:
    raise errors.ConfigError(
      f'--{flag.name}={given}; wanted a number, or several with commas between'
    ) from error
  if not values or len(set(values)) < len(values):
    raise errors.ConfigError(
      f'--{flag.name}={given}; wanted one or more different numbers'
    )
  return values


if __name__ == '__main__':
  cli.run(main, FLAGS)
