r"""Trains a tokenizer, a larger aligner or a generator.

  python -m launch.train --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS --workdir=runs/tok

A run that was stopped continues when the same command is given again.
"""

from launch import cli
from selfboottok_jax import errors
from selfboottok_jax.stages import dry_run, foresee, train

FLAGS = cli.Flags()
_CONFIG = FLAGS.config()
_WORKDIR = FLAGS.string('workdir', '', 'Folder of the run.')
_DRY_RUN = FLAGS.switch(
  'dry_run', False, 'Print what the training would cost; allocate nothing.'
)
_DEVICES = FLAGS.optional_integer(
  'devices', 'For a dry run: number of devices, simulated on the CPU.'
)
_TOPOLOGY = FLAGS.string(
  'topology',
  '',
  'For a dry run: hardware that need not be there, as v5p:4x4x4 or h100:8.',
)
_LARGEST_BATCH = FLAGS.switch(
  'largest_batch',
  True,
  'With --topology: compile twice, to find the largest batch that fits.',
)
_JSON = FLAGS.switch('json', False, 'For a dry run: print only a line of JSON.')
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
  if (_TOPOLOGY.value or _JSON.value) and not _DRY_RUN.value:
    name = '--topology' if _TOPOLOGY.value else '--json'
    raise errors.ConfigError(f'{name} belongs to --dry_run; add that flag')
  if _TOPOLOGY.value:
    if _DEVICES.value is not None or _MULTIHOST.value:
      other = '--multihost' if _MULTIHOST.value else '--devices'
      raise errors.ConfigError(
        f'--topology={_TOPOLOGY.value} has its own devices; leave {other} out'
      )
    # No start of JAX: it would claim the devices that there are.
    said = foresee.describe(
      config,
      _TOPOLOGY.value,
      largest_batch=_LARGEST_BATCH.value,
      json_only=_JSON.value,
    )
    cli.say(said)
    return
  cli.start_jax(multihost=_MULTIHOST.value, devices=_DEVICES.value)
  if _DRY_RUN.value:
    cli.say(dry_run.describe(config, json_only=_JSON.value))
    return
  cli.require(workdir=_WORKDIR.value)
  train.train(config, _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main, FLAGS)
