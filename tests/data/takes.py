"""A few batches of a training."""

import contextlib
import itertools

from selfboottok_jax import data


def take(source, count, **options):
  """The first so many batches."""
  options = {'batch_size': 8, 'image_size': 8, 'seed': 0} | options
  with contextlib.closing(data.make_train_dataset(source, **options)) as it:
    return list(itertools.islice(it, count))
