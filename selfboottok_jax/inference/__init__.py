"""Trained runs as objects: encode, decode, sample."""

from selfboottok_jax.inference.generator import ImageGenerator, load_generator
from selfboottok_jax.inference.sampling import Sampling
from selfboottok_jax.inference.tokenizer import (
  ImageTokenizer,
  Tokenizer,
  load_tokenizer,
)
from selfboottok_jax.pretrained import load_autoencoder
from selfboottok_jax.pretrained.autoencoders import ImageAutoencoder

__all__ = [
  'ImageAutoencoder',
  'ImageGenerator',
  'ImageTokenizer',
  'Sampling',
  'Tokenizer',
  'load_autoencoder',
  'load_generator',
  'load_tokenizer',
]
