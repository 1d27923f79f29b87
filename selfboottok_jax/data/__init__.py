"""Pictures, or a cache of their codes, as batches for training and scores."""

from selfboottok_jax.data.picture_set import Bad, PictureSet, PictureSource
from selfboottok_jax.data.pictures import Options, PictureError
from selfboottok_jax.data.pipeline import (
  EvalBatches,
  TrainBatches,
  make_eval_dataset,
  make_row_dataset,
  make_train_dataset,
)
from selfboottok_jax.data.scenes import ProceduralSource
from selfboottok_jax.data.sources import (
  SOURCES,
  Source,
  describe,
  is_same,
  open_all,
  open_pictures,
  open_source,
)
from selfboottok_jax.data.token_cache import (
  Statistics,
  TokenCache,
  open_token_cache,
)

__all__ = [
  'SOURCES',
  'Bad',
  'EvalBatches',
  'Options',
  'PictureError',
  'PictureSet',
  'PictureSource',
  'ProceduralSource',
  'Source',
  'Statistics',
  'TokenCache',
  'TrainBatches',
  'describe',
  'is_same',
  'make_eval_dataset',
  'make_row_dataset',
  'make_train_dataset',
  'open_all',
  'open_pictures',
  'open_source',
  'open_token_cache',
]
