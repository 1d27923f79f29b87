"""Pictures, or a cache of their codes, as batches for training and scores."""

from selfboottok_jax.data.pipeline import (
  EvalBatches,
  TrainBatches,
  make_eval_dataset,
  make_row_dataset,
  make_train_dataset,
)
from selfboottok_jax.data.scenes import ProceduralSource
from selfboottok_jax.data.sources import Source, describe, open_source
from selfboottok_jax.data.token_cache import (
  Statistics,
  TokenCache,
  open_token_cache,
)

__all__ = [
  'EvalBatches',
  'TokenCache',
  'ProceduralSource',
  'Source',
  'Statistics',
  'TrainBatches',
  'describe',
  'make_eval_dataset',
  'make_row_dataset',
  'make_train_dataset',
  'open_token_cache',
  'open_source',
]
