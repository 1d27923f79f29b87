"""Configurations by file, for --config=FILE:PRESET."""
