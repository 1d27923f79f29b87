"""Trained runs as objects: encode, decode, sample."""

from selfboottok_jax.inference.generator import (
  MIN_BATCH,
  ImageGenerator,
  load_generator,
)
from selfboottok_jax.inference.tokenizer import (
  ImageTokenizer,
  fingerprint,
  load_tokenizer,
  tokenizer_of,
)

__all__ = [
  'MIN_BATCH',
  'ImageGenerator',
  'ImageTokenizer',
  'fingerprint',
  'load_generator',
  'load_tokenizer',
  'tokenizer_of',
]
