"""Reads pictures out of uncompressed tars, in any order."""
