"""SelfBootTok in JAX: bootstrapped 1D image tokenization (arXiv 2606.05552)."""

from selfboottok_jax.inference import load_generator, load_tokenizer

__version__ = '0.1.0'
__all__ = ['__version__', 'load_generator', 'load_tokenizer']
