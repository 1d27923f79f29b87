"""Pictures, or a cache of them: sources -> rows -> pipeline -> batches."""

from selfboottok_jax.data.latent_statistics import Statistics
from selfboottok_jax.data.latents import LatentSource, open_latents
from selfboottok_jax.data.pipeline import (
  EvalBatches,
  TrainBatches,
  make_eval_dataset,
  make_row_dataset,
  make_train_dataset,
)
from selfboottok_jax.data.procedural import ProceduralSource
from selfboottok_jax.data.sources import Source, describe, open_source

__all__ = [
  'EvalBatches',
  'LatentSource',
  'ProceduralSource',
  'Source',
  'Statistics',
  'TrainBatches',
  'describe',
  'make_eval_dataset',
  'make_row_dataset',
  'make_train_dataset',
  'open_latents',
  'open_source',
]
