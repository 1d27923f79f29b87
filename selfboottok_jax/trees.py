"""Nested dicts of settings, and trees of arrays: flat names, sizes, digests."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def flatten(
  tree: Mapping[str, Any], separator: str = '.', prefix: str = ''
) -> dict[str, Any]:
  """Nested mappings as one dict; keys are joined by `separator`."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, separator, f'{prefix}{key}{separator}')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def unflatten(flat: Mapping[str, Any], separator: str = '.') -> dict[str, Any]:
  """Inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *keys, last = name.split(separator)
    node = tree
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def differences(
  stored: Mapping[str, Any], given: Mapping[str, Any], most: int = 4
) -> str:
  """Lists up to `most` keys whose values differ; '' if none does.

  A key that is absent counts as None.
  """
  found = [
    f'{key}: {stored.get(key)!r} there, {given.get(key)!r} given'
    for key in sorted(stored.keys() | given.keys())
    if stored.get(key) != given.get(key)
  ]
  more = f' and {len(found) - most} more' if len(found) > most else ''
  return ', '.join(found[:most]) + more


def count(tree: PyTree) -> int:
  """Total number of elements in a tree of arrays, or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def weights_hash(params: PyTree) -> str:
  """A short digest of all arrays, for protocols and records.

  Returns:
    The first 8 hex digits of their SHA-256, or 'none' for an empty tree.
  """
  digest, leaves = hashlib.sha256(), jax.tree.leaves(params)
  for leaf in leaves:
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:8] if leaves else 'none'
