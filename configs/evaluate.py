"""Settings of launch.evaluate, as --config=configs/evaluate.py."""

from selfboottok_jax.presets.evaluate import get_config

__all__ = ['get_config']
