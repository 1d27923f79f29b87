r"""Trains a tokenizer, a larger aligner or a generator.

  python -m launch.train --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS --workdir=runs/tok

A run that was stopped continues when the same command is given again.
"""

from launch import cli
from selfboottok_jax import errors
from selfboottok_jax.stages import dry_run, train

FLAGS = cli.Flags()
_CONFIG = FLAGS.config()
_WORKDIR = FLAGS.string('workdir', '', 'Folder of the run.')
_DRY_RUN = FLAGS.switch(
  'dry_run', False, 'Print what the training would cost; allocate nothing.'
)
_DEVICES = FLAGS.optional_integer(
  'devices', 'For a dry run: number of devices, simulated on the CPU.'
)
_MULTIHOST = FLAGS.switch(
  'multihost', False, 'Join the other processes of a pod or a cluster first.'
)


def main() -> None:
  """Trains, or prints what a training would cost."""
  config = _CONFIG.value
  if _DEVICES.value is not None and not _DRY_RUN.value:
    raise errors.ConfigError(
      f'--devices={_DEVICES.value} makes up devices for --dry_run; leave it '
      'out, a training takes all that there are'
    )
  cli.start_jax(multihost=_MULTIHOST.value, devices=_DEVICES.value)
  if _DRY_RUN.value:
    cli.say(dry_run.describe(config))
    return
  cli.require(workdir=_WORKDIR.value)
  train.train(config, _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main, FLAGS)
