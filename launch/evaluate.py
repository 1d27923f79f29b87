r"""Scores reconstructions and samples, of a run or of anybody's model.

  python -m launch.evaluate --workdir=runs/tok --config.data.path=PHOTOS \
    --metrics=rfid,psnr,ssim,lpips,usage --out=scores/tok.json
  python -m launch.evaluate --workdir=runs/gen --tokenizer=runs/tok_big \
    --reference=VIRTUAL_imagenet256_labeled.npz --num_samples=50000 \
    --metrics=fid,sfid,is,prec_recall
  python -m launch.evaluate --samples=samples.npz --reference=PHOTOS
  python -m launch.evaluate --samples=RECONSTRUCTIONS --pairs=ORIGINALS

Prints a table and one JSON line. Scores go to --out, else into the workdir.
"""

import jax

from launch import cli
from selfboottok_jax import errors
from selfboottok_jax.evaluation import evaluate, metrics
from selfboottok_jax.presets import evaluate as presets
from selfboottok_jax.stages import score

FLAGS = cli.Flags()
# By its place: the command works in any folder.
_CONFIG = FLAGS.config(presets.__file__)
_WORKDIR = FLAGS.string('workdir', '', 'The run to score.')
_TOKENIZER = FLAGS.string(
  'tokenizer', '', 'Workdir of the tokenizer that decodes for a generator.'
)
_SAMPLES = FLAGS.string(
  'samples', '', 'Images of any model: a folder, a tar or an .npz file.'
)
_PAIRS = FLAGS.string('pairs', '', 'Originals of --samples, by their names.')
_REFERENCE = FLAGS.string(
  'reference', '', 'Real images: photographs, or an .npz as ADM has it.'
)
_VALIDATION = FLAGS.string(
  'validation', '', 'Real images that --reference has not, for fdr.'
)
_METRICS = FLAGS.strings(
  'metrics', [], 'As rfid,psnr,lpips_vgg:FILE; default: what is possible.'
)
_OUT = FLAGS.string('out', '', 'File for the scores, as JSON.')
_NUM_SAMPLES = FLAGS.optional_integer(
  'num_samples', 'Of a generator; default: config.num_samples.'
)
_STEP = FLAGS.optional_integer('step', 'Checkpoint; default: the newest.')
_EMA = FLAGS.switch('ema', True, 'Score the means of the parameters.')
_SAVE = FLAGS.string(
  'save_reconstructions', '', 'New folder, or .npz file, to write them to.'
)
_MULTIHOST = FLAGS.switch(
  'multihost', False, 'Share the work with the other processes of a pod.'
)


def main() -> None:
  """Scores a run, or images."""
  _check_flags()
  cli.start_jax(multihost=_MULTIHOST.value)
  request = score.Request(_METRICS.value, _REFERENCE.value, _VALIDATION.value)
  if _SAMPLES.value:
    found = score.score_samples(
      _CONFIG.value,
      _SAMPLES.value,
      pairs=_PAIRS.value,
      request=request,
      out=_OUT.value,
    )
  else:
    found = score.score_run(
      _CONFIG.value,
      _WORKDIR.value,
      _TOKENIZER.value,
      request=request,
      num_samples=_NUM_SAMPLES.value,
      step=_STEP.value,
      ema=_EMA.value,
      out=_OUT.value,
      save_reconstructions=_SAVE.value,
    )
  if jax.process_index() == 0:
    cli.say(evaluate.as_text(found))


def _check_flags() -> None:
  """Raises ConfigError for flags that do not belong together."""
  if bool(_WORKDIR.value) == bool(_SAMPLES.value):
    raise errors.ConfigError(
      f'--workdir={_WORKDIR.value} and --samples={_SAMPLES.value}; wanted one '
      'of them: a run, or the images of any model'
    )
  of_runs = (_TOKENIZER, _NUM_SAMPLES, _STEP, _EMA, _SAVE)
  wrong = [_PAIRS] if _WORKDIR.value else of_runs
  for flag in wrong:
    if flag.present:
      other = '--workdir=RUN' if _SAMPLES.value else '--samples=IMAGES'
      raise errors.ConfigError(
        f'--{flag.name}={flag.value} is for {other}; leave it out'
      )
  if _METRICS.present:
    metrics.parse(_METRICS.value)


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
