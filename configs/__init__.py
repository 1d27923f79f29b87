"""Configurations: plain ml_collections, importable without jax."""
