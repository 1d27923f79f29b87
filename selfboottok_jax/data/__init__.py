"""Pictures: sources -> transforms -> pipeline -> batches."""

from selfboottok_jax.data.pipeline import (
  EvalBatches,
  TrainBatches,
  make_eval_dataset,
  make_train_dataset,
)
from selfboottok_jax.data.procedural import ProceduralSource
from selfboottok_jax.data.sources import Source, describe, open_source

__all__ = [
  'EvalBatches',
  'ProceduralSource',
  'Source',
  'TrainBatches',
  'describe',
  'make_eval_dataset',
  'make_train_dataset',
  'open_source',
]
