"""Encodes a data set once, so that generators learn from codes, not images.

  python -m launch.encode --config=configs/generator.py:photos64 \
    --config.tokenizer=runs/tok --config.data.path=PHOTOS --out=cache

A training takes it as --config.data.cache=cache. A command that was stopped
continues when it is given again.
"""

from launch import cli
from selfboottok_jax import files
from selfboottok_jax.data import token_cache
from selfboottok_jax.stages import encode_dataset

FLAGS = cli.Flags()
_CONFIG = FLAGS.config()
_OUT = FLAGS.string('out', '', 'Folder of the cache.')
_SPLITS = FLAGS.strings('splits', ['train', 'val'], 'Splits to encode.')
_SHARDS = FLAGS.optional_integer(
  'shards', 'Files of each split; one per 10,000 images by default.'
)
_DTYPE = FLAGS.string(
  'dtype',
  'float16',
  'Type of the stored numbers: float16, which rounds them by 0.05 % of their '
  'size at most, or float32. Trainings read both as float32.',
)
_BATCH_SIZE = FLAGS.optional_integer(
  'batch_size', 'Images at a time in each process.'
)
_MULTIHOST = FLAGS.switch(
  'multihost', False, 'Join the other processes of a pod or a cluster first.'
)
_MEASURE = FLAGS.switch(
  'measure', False, 'Time the encoder alone too, and compare.'
)


def main() -> None:
  """Encodes the data set that the configuration names."""
  config = _CONFIG.value
  cli.require(out=_OUT.value)
  out = files.local_path('--out', _OUT.value, token_cache.ELSEWHERE)
  files.check_folder('out', out)
  cli.start_jax(multihost=_MULTIHOST.value)
  encode_dataset.encode_dataset(
    config,
    out,
    splits=_SPLITS.value,
    shards=_SHARDS.value,
    dtype=_DTYPE.value,
    batch_size=_BATCH_SIZE.value,
    measure=_MEASURE.value,
    say=cli.say,
  )


if __name__ == '__main__':
  cli.run(main, FLAGS)
