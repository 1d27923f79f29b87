"""Reads a weight file: safetensors, torch's .pth, .pt, .ckpt and .bin, or .npz.

What a file is, its first bytes say and not its name. Nothing is unpickled: see
`torch_files` for what torch reads.
"""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors

from selfboottok_jax import errors
from selfboottok_jax.pretrained import torch_files

SUFFIXES = ('.safetensors', '.npz', '.pth', '.pt', '.ckpt', '.bin')

# What numpy, zipfile, safetensors and torch raise for a file that is cut short,
# or not theirs.
_DAMAGE = (
  safetensors.SafetensorError,
  zipfile.BadZipFile,
  zlib.error,
  *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError),
  *(LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
  *torch_files.DAMAGE,
)
_DTYPES = (
  *('BOOL', 'U8', 'I8', 'U16', 'I16', 'U32', 'I32', 'U64', 'I64'),
  *('F16', 'BF16', 'F32', 'F64'),
)
# Beginnings of what is often found in place of weights.
_OTHERS = {
  b'version https://git-lfs': 'a pointer of Git LFS: run `git lfs pull`',
  b'<': 'a web page: download the file itself',
  b'\x89PNG': 'a PNG image',
  b'\xff\xd8\xff': 'a JPEG image',
  b'\x93NUMPY': 'a single array without a name',
  b'\x89HDF': 'HDF5',
  b'\x1f\x8b': 'gzip: unpack it first',
}
# safetensors itself takes no longer header.
_MAX_HEADER = 100_000_000
_SHOWN = 4


def read(path: str | os.PathLike[str], part: str = '') -> dict[str, np.ndarray]:
  """All arrays of a weight file, by name.

  Args:
    path: the file.
    part: which state dict of a checkpoint that holds several, as 'ema'; '' for
      the one that `torch_files.state_dict` prefers.

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
    return torch_files.read(file, part)
  except _DAMAGE as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise errors.WeightsError(
      f'{path} is not an intact {kind} file ({reason[:200]}); copy or download '
      'it again'
    ) from error


def read_all(
  paths: Mapping[str, pathlib.Path], part: str = ''
) -> dict[str, np.ndarray]:
  """The arrays of several files together, by name; see `read`."""
  arrays = {}
  for path in paths.values():
    more = read(path, part)
    twice = sorted(arrays.keys() & more.keys())
    if twice:
      raise errors.WeightsError(
        f'{path} has arrays that another of {", ".join(paths)} has too '
        f'({", ".join(twice[:_SHOWN])}); give files of different parts'
      )
    arrays |= more
  return arrays


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """What the header of a safetensors file says; {} for other files."""
  file = pathlib.Path(path)
  try:
    if _kind(file) != 'safetensors':
      return {}
    with safetensors.safe_open(file, framework='np') as opened:
      return opened.metadata() or {}
  except (*_DAMAGE, errors.WeightsError):
    # `read` tells what is wrong with it.
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
    dtypes = {n: opened.get_slice(n).get_dtype() for n in opened.keys()}  # noqa: SIM118 - it is no dict
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
