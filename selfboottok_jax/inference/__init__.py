"""Trained runs as objects: encode, decode, sample."""

from selfboottok_jax.inference.generator import (
  ImageGenerator,
  generator_of,
  load_generator,
)
from selfboottok_jax.inference.sampling import Sampling, sweep
from selfboottok_jax.inference.tokenizer import (
  ImageTokenizer,
  fingerprint,
  load_tokenizer,
  tokenizer_of,
)
from selfboottok_jax.pretrained import load_autoencoder
from selfboottok_jax.pretrained.autoencoders import ImageAutoencoder

__all__ = [
  'ImageAutoencoder',
  'ImageGenerator',
  'ImageTokenizer',
  'Sampling',
  'fingerprint',
  'generator_of',
  'load_autoencoder',
  'load_generator',
  'load_tokenizer',
  'sweep',
  'tokenizer_of',
]
