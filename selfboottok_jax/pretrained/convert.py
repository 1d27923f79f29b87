"""Reads a weight file against the list of arrays that a network wants."""

import pathlib
import zipfile
import zlib
from collections.abc import Collection, Mapping

import numpy as np

from selfboottok_jax import errors

Shapes = Mapping[str, tuple[int, ...]]

# What numpy and zipfile raise for a file that is cut short or not theirs.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  ValueError,
  EOFError,
  KeyError,
  OSError,
  RuntimeError,
  NotImplementedError,
)
_SHOWN = 4


def read_npz(
  path: str, wanted: Shapes, network: str, unused: Collection[str] = ()
) -> dict[str, np.ndarray]:
  """Reads exactly the arrays `wanted` from an .npz file.

  Args:
    path: the file.
    wanted: name to shape of every array that the network needs.
    network: name of the network, for messages.
    unused: names that may be in the file and are left there.

  Returns:
    Name to array, in the dtype of the file.

  Raises:
    WeightsError: no such file, not an .npz or damaged, or arrays that do not
      fit; all that do not fit are in the one message.
  """
  arrays = _read(path, network)
  check(arrays, wanted, network, source=path, unused=unused)
  return {name: arrays[name] for name in wanted}


def check(
  arrays: Mapping[str, np.ndarray],
  wanted: Shapes,
  network: str,
  source: str,
  unused: Collection[str] = (),
) -> None:
  """Raises one WeightsError that lists all that does not fit `wanted`."""
  if not set(wanted) & set(arrays):
    raise errors.WeightsError(
      f'{source} holds another network: its {len(arrays)} arrays '
      f'({_some(sorted(arrays))}) have no name in common with {network} '
      f'({_some(list(wanted))}); give a {network} file'
    )
  missing = [name for name in wanted if name not in arrays]
  extra = [n for n in arrays if n not in wanted and n not in unused]
  present = [name for name in wanted if name in arrays]
  wrong = [
    f'{name} is {arrays[name].shape}, wanted {tuple(wanted[name])}'
    for name in present
    if arrays[name].shape != tuple(wanted[name])
  ]
  broken = [name for name in present if not _is_finite(arrays[name])]
  problems = [
    f'{len(names)} {what}: {"; ".join(names)}'
    for what, names in (
      ('missing', missing),
      ('unexpected', extra),
      ('mis-shaped', wrong),
      ('not finite numbers', broken),
    )
    if names
  ]
  if problems:
    raise errors.WeightsError(
      f'{source} does not fit {network}: {" | ".join(problems)}; '
      f'give a {network} file whose arrays have the wanted names and shapes'
    )


def _read(path: str, network: str) -> dict[str, np.ndarray]:
  file = pathlib.Path(path)
  if not file.is_file():
    raise errors.WeightsError(
      f'no weight file at {path!r}; give the path of a {network} .npz file'
    )
  try:
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
  except _DAMAGE as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise errors.WeightsError(
      f'{path} is not an intact .npz of {network} ({reason}); '
      'copy or download it again'
    ) from error


def _is_finite(array: np.ndarray) -> bool:
  if not np.issubdtype(array.dtype, np.number):
    return False
  return bool(np.isfinite(array).all())


def _some(names: list[str]) -> str:
  tail = ', ...' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + tail
