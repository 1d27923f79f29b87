"""Trains a tokenizer, a larger aligner or a generator.

  python -m launch.train --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS --workdir=runs/tok

A run that was stopped continues when the same command is given again.
"""

from absl import flags

from launch import cli, trainer

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Build everything, print its sizes, train nothing.'
)
_MULTIHOST = flags.DEFINE_bool(
  'multihost', False, 'Join the other processes of a pod or a cluster first.'
)


def main(argv) -> None:
  """Trains what the flags say."""
  del argv
  cli.require(config=_CONFIG.value)
  cli.start_jax(multihost=_MULTIHOST.value)
  if _DRY_RUN.value:
    trainer.describe(_CONFIG.value)
    return
  cli.require(workdir=_WORKDIR.value)
  trainer.train(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
