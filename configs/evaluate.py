"""What launch.evaluate scores a run on."""

from selfboottok_jax.presets.evaluate import get_config

__all__ = ['get_config']
