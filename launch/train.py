"""Trains a tokenizer, a larger aligner or a generator.

  python -m launch.train --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS --workdir=runs/tok

A run that was stopped continues when the same command is given again.
"""

from absl import flags

from launch import cli
from selfboottok_jax import errors
from selfboottok_jax.stages import dry_run, train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print what the training would cost; allocate nothing.'
)
_DEVICES = flags.DEFINE_integer(
  'devices', None, 'Of a dry run: as on so many devices, made up on the CPU.'
)
_MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Join the other processes of a pod or a cluster first.'
)


def main(argv) -> None:
  """Trains what the flags say."""
  del argv
  cli.require(config=_CONFIG.value)
  cli.start_jax(multihost=_MULTIHOST.value, devices=_devices())
  if _DRY_RUN.value:
    cli.say(dry_run.describe(_CONFIG.value))
    return
  cli.require(workdir=_WORKDIR.value)
  train.train(_CONFIG.value, _WORKDIR.value)


def _devices() -> int | None:
  """The made-up devices, of a dry run alone."""
  if _DEVICES.value is not None and not _DRY_RUN.value:
    raise errors.ConfigError(
      f'--devices={_DEVICES.value} makes up devices for --dry_run; leave it '
      'out, a training takes all that there are'
    )
  return _DEVICES.value


if __name__ == '__main__':
  cli.run(main)
