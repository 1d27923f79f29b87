"""Presets by file, as --config=configs/tokenizer.py:PRESET."""

from selfboottok_jax.presets.tokenizer import PRESETS, get_config

__all__ = ['PRESETS', 'get_config']
