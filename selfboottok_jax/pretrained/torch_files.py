"""Checkpoints of torch, read by torch with `weights_only=True` or not at all.

Such a file is a pickle, a program that could do anything; torch's restricted
reader takes arrays, numbers and texts from it and refuses all else, but for the
bare records of INERT. torch is needed for these files alone, and nothing here
reads them without it.
"""

import argparse
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfboottok_jax import errors

# Of several state dicts in a checkpoint the first of these is taken. Averaged
# parameters are what papers score, and what the authors' own scripts prefer.
PREFERRED = (
  *('ema', 'ema_model', 'model_ema', 'params_ema'),
  *('target_encoder', 'teacher', 'state_dict', 'model', 'module', 'params'),
)
# What training wraps around a network, before all of its names.
_WRAPPERS = ('module.', '_orig_mod.')

# Classes that trainings save their settings in, and that have no code of their
# own: to make one sets its attributes.
INERT = (argparse.Namespace,)

DAMAGE = (pickle.UnpicklingError, struct.error)

# Below, `weights_only` could be tricked into running code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


def read(file: pathlib.Path, part: str = '') -> dict[str, np.ndarray]:
  """The arrays of a checkpoint, by name.

  Args:
    file: saved by torch, as a zip archive or in its older format.
    part: see `state_dict`.

  Raises:
    WeightsError: torch is missing or too old, or the file holds objects that
      are not arrays; no code of it is run.
    Exception: of many kinds, for a file that is damaged.
  """
  torch = _import_torch(file)
  try:
    with warnings.catch_warnings():
      # That its pickle protocol or its storages are of an older kind.
      warnings.simplefilter('ignore')
      value = _load(torch, file)
  except (pickle.UnpicklingError, RuntimeError) as error:
    _refuse_code(file, str(error))
    raise
  arrays = state_dict(value, str(file), part)
  return {name: _to_numpy(array) for name, array in arrays.items()}


def state_dict(value: Any, path: str, part: str = '') -> dict[str, Any]:
  """The network's arrays in what a checkpoint holds.

  Args:
    value: a dict of arrays by name; or one of such dicts and of whatever else a
      training keeps, as {'ema': {...}, 'model': {...}, 'epoch': 3}.
    path: names the file in errors.
    part: key of the dict to take; '' for the first of PREFERRED, else the only
      one.

  Returns:
    Name to array, without what DataParallel and torch.compile put before every
    name, and without entries that are no arrays.

  Raises:
    WeightsError: no arrays, no such part, or several to choose from.
  """
  parts = _parts(value)
  if part:
    if part not in parts:
      raise errors.WeightsError(
        f'{path} has no state dict {part!r}; it has {_listed(parts)}'
      )
    return state_dict(parts[part], path)
  for name in PREFERRED:
    if name in parts:
      return state_dict(parts[name], path)
  arrays = _arrays(value)
  if arrays:
    return _unwrap(arrays)
  if len(parts) != 1:
    raise errors.WeightsError(
      f'{path} has {_listed(parts)}, wanted one state dict; save the one that '
      'is wanted in a file of its own'
    )
  return state_dict(*parts.values(), path)


def _parts(value: Any) -> dict[str, Any]:
  """Entries of a checkpoint that are state dicts, or hold a preferred one."""
  if not isinstance(value, Mapping):
    return {}
  return {
    name: inner
    for name, inner in value.items()
    if isinstance(name, str)
    and isinstance(inner, Mapping)
    and (_arrays(inner) or any(p in _parts(inner) for p in PREFERRED))
  }


def _arrays(value: Any) -> dict[str, Any]:
  """Entries that are arrays of numpy or torch."""
  if not isinstance(value, Mapping):
    return {}
  return {
    name: array
    for name, array in value.items()
    if isinstance(name, str) and hasattr(array, 'dtype')
  }


def _unwrap(arrays: dict[str, Any]) -> dict[str, Any]:
  for prefix in _WRAPPERS:
    while all(name.startswith(prefix) for name in arrays):
      arrays = {n.removeprefix(prefix): array for n, array in arrays.items()}
  return arrays


def _listed(parts: Mapping[str, Any]) -> str:
  return f'the state dicts {", ".join(parts)}' if parts else 'no arrays'


def _import_torch(file: pathlib.Path) -> Any:
  try:
    import torch
  except (ImportError, OSError) as error:
    raise errors.WeightsError(
      f'{file} is a file of torch, which is not installed; `pip install torch` '
      '(that for the CPU is enough), or convert it where torch is with `python '
      '-m launch.convert --network=NAME:FILE --out=FOLDER` and give FOLDER here'
    ) from error
  numbers = re.match(r'(\d+)\.(\d+)', torch.__version__)
  if numbers and tuple(map(int, numbers.groups())) < _SAFE_TORCH:
    raise errors.WeightsError(
      f'torch {torch.__version__} cannot be trusted to open {file} without '
      "running code in it; `pip install 'torch>=2.6'`"
    )
  return torch


def _load(torch: Any, file: pathlib.Path) -> Any:
  options = {'map_location': 'cpu', 'weights_only': True}
  with torch.serialization.safe_globals(list(INERT)):
    if zipfile.is_zipfile(file):
      _check_sums(file)
      return torch.load(file, mmap=True, **options)
    with file.open('rb') as opened:
      value = torch.load(opened, **options)
      # The older format has no checksums, and torch reads on where bytes moved.
      if opened.read(1):
        raise EOFError('it goes on behind its end')
    return value


def _check_sums(file: pathlib.Path) -> None:
  """Looks for flipped bits, which torch does not."""
  with zipfile.ZipFile(file) as archive:
    # All zero: torch was told to write none.
    has_sums = any(member.CRC for member in archive.infolist())
    damaged = archive.testzip() if has_sums else None
  if damaged is not None:
    raise zipfile.BadZipFile(f'bad checksum of {damaged}')


def _refuse_code(file: pathlib.Path, message: str) -> None:
  """Raises WeightsError where torch met more than arrays.

  torch's own message tells how to run such code, which is no advice to give.
  """
  found = re.search(r'GLOBAL ([\w.]+)', message)
  if found or 'TorchScript' in message:
    what = found[1] if found else 'TorchScript'
    raise errors.WeightsError(
      f'{file} holds more than arrays ({what}), which only running its code '
      'could read, so it was not read; where you trust it, save its state dict '
      'alone with safetensors.torch.save_file and give that file'
    )
  if 'Weights only load failed' in message:
    raise EOFError('its pickle breaks off or is not of torch')


def _to_numpy(tensor: Any) -> np.ndarray:
  if 'bfloat16' in str(tensor.dtype):
    # numpy knows no number of that kind.
    tensor = tensor.float()
  return tensor.detach().numpy()
