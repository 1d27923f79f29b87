"""Imported parameters on disk: a folder of params.safetensors and record.json.

Names of the arrays are the keys of the parameters, joined by '/'. The record
(network, source, SHA-256 of each of its files, what else the parameters depend
on) is in the header of the safetensors file too, so that this file alone can
be carried to another machine; record.json has the SHA-256 of that file besides.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from absl import logging
from jaxtyping import PyTree
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors
from selfboottok_jax.pretrained import weight_files

PARAMS, RECORD = 'params.safetensors', 'record.json'
_DAMAGE = (OSError, ValueError, LookupError, TypeError, errors.WeightsError)
# Seconds after which nobody can still be writing.
_ABANDONED = 24 * 3600
# Key of the record in the header.
_HEADER = 'selfboottok_jax'


def sha256(path: pathlib.Path) -> str:
  """Of a file, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def digests(paths: Mapping[str, pathlib.Path]) -> dict[str, str]:
  """SHA-256 of files by what they are called; WeightsError if unreadable."""
  try:
    return {name: sha256(path) for name, path in paths.items()}
  except OSError as error:
    raise errors.WeightsError(
      f'{error.filename} cannot be read ({error.strerror}); make it readable, '
      'or give another file'
    ) from error


def flatten(params: PyTree, prefix: str = '') -> dict[str, np.ndarray]:
  """Nested dicts to one, keys joined by '/'; own float32 copies of the leaves.

  Raises:
    ValueError: a key that is no text or has a '/'.
  """
  flat = {}
  for key, value in params.items():
    if not isinstance(key, str) or '/' in key:
      raise ValueError(f"parameters have the key {key!r}; wanted no '/' in it")
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}/')
    else:
      # A copy: the leaf may be a view of a mapped file, that may change, and
      # safetensors writes bytes as they lie, transposed ones wrongly.
      flat[prefix + key] = np.array(value, np.float32, order='C')
  return flat


def unflatten(flat: Mapping[str, np.ndarray]) -> PyTree:
  """The inverse of `flatten`."""
  params = {}
  for name, array in flat.items():
    *keys, last = name.split('/')
    node = params
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = array
  return params


def write(
  folder: pathlib.Path,
  flat: Mapping[str, np.ndarray],
  record: Mapping[str, Any],
) -> None:
  """Makes an entry, all of it or nothing.

  A damaged entry makes way; an intact one, of another process that was first,
  stays.

  Raises:
    OSError: the folder cannot be written.
  """
  _sweep(folder.parent)
  part = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}')
  try:
    part.mkdir(parents=True)
    metadata = {_HEADER: json.dumps(record)}
    try:
      safetensors_numpy.save_file(dict(flat), part / PARAMS, metadata)
    except safetensors.SafetensorError as error:
      raise OSError(str(error)) from error
    whole = {**record, 'params_sha256': sha256(part / PARAMS)}
    (part / RECORD).write_text(json.dumps(whole, indent=2) + '\n')
    # safetensors lets nobody else read; a cache may be shared.
    shutil.copymode(part / RECORD, part / PARAMS)
    _publish(part, folder)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _sweep(folder: pathlib.Path) -> None:
  """Removes what processes that were killed long ago left half written."""
  for part in folder.glob('.*.*'):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - part.stat().st_mtime > _ABANDONED:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: pathlib.Path, folder: pathlib.Path) -> None:
  if folder.exists() and read(folder) is None:
    aside = part.with_name(f'{part.name}.damaged')
    with contextlib.suppress(FileNotFoundError):
      os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
  try:
    os.replace(part, folder)
  except OSError:
    if read(folder) is None:
      raise


def read(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The flat arrays of an entry; None where it is missing or damaged."""
  if not folder.exists():
    return None
  try:
    wanted = json.loads((folder / RECORD).read_text())['params_sha256']
    if sha256(folder / PARAMS) != wanted:
      raise ValueError(f'{PARAMS} is not the file of its record')
    return weight_files.read(folder / PARAMS)
  except _DAMAGE as error:
    logging.warning('%s is damaged (%s)', folder, error)
    return None


def record_of(path: pathlib.Path) -> dict[str, Any] | None:
  """The record in a file's header; None for a file of anybody else."""
  text = weight_files.metadata(path).get(_HEADER)
  try:
    record = json.loads(text) if text else None
  except ValueError:
    return None
  return record if isinstance(record, dict) else None
