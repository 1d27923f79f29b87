"""Presets by file, as --config=configs/generator.py:PRESET."""

from selfboottok_jax.presets.generator import PRESETS, get_config

__all__ = ['PRESETS', 'get_config']
