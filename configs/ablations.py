"""Rows of the ablations, and what may be changed for all of them."""

from selfboottok_jax.presets.ablations import ROWS, TABLES, get_config

__all__ = ['ROWS', 'TABLES', 'get_config']
