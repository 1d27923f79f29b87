"""Presets by file, as --config=configs/scaling.py:PRESET."""

from selfboottok_jax.presets.scaling import PRESETS, get_config

__all__ = ['PRESETS', 'get_config']
