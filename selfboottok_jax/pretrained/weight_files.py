"""Reads a weight file: safetensors, torch's .pth, .pt, .ckpt and .bin, or .npz.

The kind of a file is recognised by its first bytes, not by its name. Nothing is
unpickled here. A checkpoint of torch is a pickle, a program that could do
anything; torch's restricted reader (`weights_only=True`) takes arrays, numbers
and texts from it and refuses all else, but for the bare records of INERT. torch
is needed for these files alone, and nothing reads them without it.
"""

import argparse
import os
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from selfboottok_jax import errors

# safetensors and torch map files of this machine into memory.
ELSEWHERE = (
  'weight files are read and written on local disks alone; wanted a place '
  'there, copied with gcloud storage cp -r FROM TO'
)
SUFFIXES = ('.safetensors', '.npz', '.pth', '.pt', '.ckpt', '.bin')

# Errors of numpy, zipfile, safetensors and torch for files that are cut short
# or not theirs.
_DAMAGE = (
  safetensors.SafetensorError,
  zipfile.BadZipFile,
  zlib.error,
  *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError),
  *(LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
  *(pickle.UnpicklingError, struct.error),
)
_DTYPES = (
  *('BOOL', 'U8', 'I8', 'U16', 'I16', 'U32', 'I32', 'U64', 'I64'),
  *('F16', 'BF16', 'F32', 'F64'),
)
# First bytes of files that are often found in place of weights.
_OTHERS = {
  b'version https://git-lfs': 'a pointer of Git LFS: run `git lfs pull`',
  b'<': 'a web page: download the file itself',
  b'\x89PNG': 'a PNG image',
  b'\xff\xd8\xff': 'a JPEG image',
  b'\x93NUMPY': 'a single array without a name',
  b'\x89HDF': 'HDF5',
  b'\x1f\x8b': 'gzip: unpack it first',
}
# safetensors itself refuses longer headers.
_MAX_HEADER = 100_000_000
_SHOWN = 4


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads all arrays of a weight file, by name.

  Args:
    path: the file.

  Returns:
    Name to array in the dtype of the file; bfloat16 becomes float32.

  Raises:
    WeightsError: no such file, of another kind, cut short, damaged, or with
      objects that are not arrays; no code of it is run.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise errors.WeightsError(
      f'no weight file at {str(path)!r}; give the path of a file '
      f'({", ".join(SUFFIXES)})'
    )
  kind = 'weight'
  try:
    kind = _kind(file)
    if kind == 'safetensors':
      return _read_safetensors(file)
    if kind == '.npz':
      return _read_npz(file)
    return read_torch(file)
  except _DAMAGE as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise errors.WeightsError(
      f'{path} is not an intact {kind} file ({reason[:200]}); copy or download '
      'it again'
    ) from error


def read_all(paths: Mapping[str, pathlib.Path]) -> dict[str, np.ndarray]:
  """Reads the arrays of several files together, by name; see `read`."""
  arrays: dict[str, np.ndarray] = {}
  for path in paths.values():
    more = read(path)
    twice = sorted(arrays.keys() & more.keys())
    if twice:
      raise errors.WeightsError(
        f'{path} has arrays that another of {", ".join(paths)} has too '
        f'({", ".join(twice[:_SHOWN])}); give files of different parts'
      )
    arrays |= more
  return arrays


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """Metadata in the header of a safetensors file; {} for other files."""
  file = pathlib.Path(path)
  try:
    if _kind(file) != 'safetensors':
      return {}
    with safetensors.safe_open(file, framework='np') as opened:
      return opened.metadata() or {}
  except (*_DAMAGE, errors.WeightsError):
    # `read` reports what is wrong with it.
    return {}


def _kind(file: pathlib.Path) -> str:
  """'safetensors', '.npz' or 'torch'; WeightsError for anything else."""
  with file.open('rb') as opened:
    head = opened.read(64)
  if head.startswith(b'PK'):
    with zipfile.ZipFile(file) as archive:
      names = archive.namelist()
    if any(name.split('/')[-1] == 'data.pkl' for name in names):
      return 'torch'
    if names and all(name.endswith('.npy') for name in names):
      return '.npz'
    found = 'a zip archive of other files'
  elif head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _MAX_HEADER:
    return 'safetensors'
  elif len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
    return 'torch'
  else:
    found = next(
      (what for start, what in _OTHERS.items() if head.startswith(start)),
      'of a kind that is not known' if head else 'empty',
    )
  raise errors.WeightsError(
    f'{file} holds no weights, it is {found}; give a file in one of the '
    f'formats {", ".join(SUFFIXES)}'
  )


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  with safetensors.safe_open(file, framework='np') as opened:
    dtypes = {n: opened.get_slice(n).get_dtype() for n in opened.keys()}  # noqa: SIM118
    odd = [f'{n} is {d}' for n, d in dtypes.items() if d not in _DTYPES]
    if odd:
      raise errors.WeightsError(
        f'{file} has arrays of unusual kinds ({"; ".join(odd[:_SHOWN])}); '
        'give a file in float32, float16 or bfloat16'
      )
    return {name: _widen(opened.get_tensor(name)) for name in dtypes}


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
  # Checksums first: a damaged header could ask for absurd amounts of memory.
  with zipfile.ZipFile(file) as archive:
    damaged = archive.testzip()
  if damaged is not None:
    raise zipfile.BadZipFile(f'bad checksum of {damaged}')
  with np.load(file, allow_pickle=False) as stored:
    arrays = {name: stored[name] for name in stored.files}
  # numpy hands out the bytes of a member that is not an array.
  if not all(isinstance(array, np.ndarray) for array in arrays.values()):
    raise ValueError('it holds more than arrays')
  return arrays


def _widen(array: np.ndarray) -> np.ndarray:
  """bfloat16 as float32: numpy knows no number of that kind."""
  is_narrow = array.dtype == ml_dtypes.bfloat16
  return array.astype(np.float32) if is_narrow else array


# The first of these state dicts in a checkpoint is taken. Averaged parameters
# come first: papers score them, and the authors' own scripts prefer them.
PREFERRED = (
  *('ema', 'ema_model', 'model_ema', 'params_ema'),
  *('target_encoder', 'teacher', 'state_dict', 'model', 'module', 'params'),
)
# Prefixes of all names, from wrappers that training puts around a network.
_WRAPPERS = ('module.', '_orig_mod.')

# Classes without code in which trainings save their settings: making one sets
# its attributes alone.
INERT = (argparse.Namespace,)

# Below, `weights_only` could be tricked into running code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


def read_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint, by name.

  Args:
    file: saved by torch, as a zip archive or in its older format.

  Raises:
    WeightsError: torch is missing or too old, or the file holds objects that
      are not arrays; no code of it is run.
    Exception: of many kinds, for a file that is damaged.
  """
  torch = _import_torch(file)
  try:
    with warnings.catch_warnings():
      # Warnings of an older pickle protocol or older storages.
      warnings.simplefilter('ignore')
      value = _load(torch, file)
  except (pickle.UnpicklingError, RuntimeError) as error:
    _refuse_code(file, str(error))
    raise
  arrays = state_dict(value, str(file))
  return {name: _to_numpy(array) for name, array in arrays.items()}


def state_dict(value: Any, path: str) -> dict[str, Any]:
  """Finds the network's arrays in the content of a checkpoint.

  Of several state dicts it takes the first of PREFERRED, else the only one.

  Args:
    value: a dict of arrays by name; or a dict of such dicts, and of whatever
      else a training keeps, as {'ema': {...}, 'model': {...}, 'epoch': 3}.
    path: names the file in errors.

  Returns:
    Name to array, without what DataParallel and torch.compile put before every
    name, and without entries that are no arrays.

  Raises:
    WeightsError: no arrays, or several such dicts to choose from.
  """
  parts = _state_dicts(value)
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
  (inner,) = parts.values()
  return state_dict(inner, path)


def _state_dicts(value: Any) -> dict[str, Any]:
  """Entries of a checkpoint that are state dicts, or hold a preferred one."""
  if not isinstance(value, Mapping):
    return {}
  return {
    name: inner
    for name, inner in value.items()
    if isinstance(name, str)
    and isinstance(inner, Mapping)
    and (_arrays(inner) or any(p in _state_dicts(inner) for p in PREFERRED))
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
      # The older format has no checksums; bytes left over show that some moved.
      if opened.read(1):
        raise EOFError('it goes on behind its end')
    return value


def _check_sums(file: pathlib.Path) -> None:
  """Looks for flipped bits, which torch does not."""
  with zipfile.ZipFile(file) as archive:
    # All zero: torch wrote none.
    has_sums = any(member.CRC for member in archive.infolist())
    damaged = archive.testzip() if has_sums else None
  if damaged is not None:
    raise zipfile.BadZipFile(f'bad checksum of {damaged}')


def _refuse_code(file: pathlib.Path, message: str) -> None:
  """Raises WeightsError where torch met more than arrays.

  torch's own message explains how to run such code, which is bad advice.
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
