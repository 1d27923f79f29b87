"""SelfBootTok in JAX: bootstrapped 1D image tokenization (arXiv 2606.05552).

import selfboottok_jax as sbt

config = sbt.get_config('tokenizer:photos64')
config.data.path = 'PHOTOS'
sbt.train(config, 'runs/tok')
codes = sbt.load_tokenizer('runs/tok').encode(images)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'
__all__ = [
  '__version__',
  'get_config',
  'load_generator',
  'load_tokenizer',
  'score_run',
  'train',
]

if TYPE_CHECKING:
  from selfboottok_jax.inference import load_generator, load_tokenizer
  from selfboottok_jax.presets import get_config
  from selfboottok_jax.stages.score import score_run
  from selfboottok_jax.stages.train import train

# Loaded when they are first used: presets need no jax, and inference needs
# nothing of training.
_HOMES = {
  'get_config': 'selfboottok_jax.presets',
  'load_generator': 'selfboottok_jax.inference',
  'load_tokenizer': 'selfboottok_jax.inference',
  'score_run': 'selfboottok_jax.stages.score',
  'train': 'selfboottok_jax.stages.train',
}


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_HOMES[name]), name)
