"""Atomic writes, and checks of the folders to write into."""

import contextlib
import json
import os
import pathlib
from typing import Any

from selfboottok_jax import errors


def write_atomically(
  path: str | os.PathLike[str], data: bytes, *, durable: bool = False
) -> pathlib.Path:
  """Writes a file so that readers see the old contents or the new, never half.

  Args:
    path: the file; missing folders are made.
    data: its contents.
    durable: whether to wait until the data is on the disk, so that the file
      survives a loss of power.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, as a rename is atomic within one file system only.
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with partial.open('wb') as file:
      file.write(data)
      if durable:
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise
  return path


def write_json(
  path: str | os.PathLike[str],
  content: Any,
  *,
  durable: bool = False,
  sort_keys: bool = False,
) -> pathlib.Path:
  """Writes indented JSON; see `write_atomically`."""
  text = json.dumps(content, indent=2, sort_keys=sort_keys)
  return write_atomically(path, f'{text}\n'.encode(), durable=durable)


def is_remote(path: str | os.PathLike[str]) -> bool:
  """True for a path in a bucket, as gs://BUCKET/FOLDER."""
  return '://' in os.fspath(path)


def is_vacant(folder: str | os.PathLike[str]) -> bool:
  """True if a folder is absent or holds nothing but hidden files.

  A command that was killed at its start leaves hidden partial files behind.
  """
  path = pathlib.Path(folder)
  return not path.exists() or all(p.name[0] == '.' for p in path.iterdir())


def remove_partials(folder: str | os.PathLike[str]) -> None:
  """Removes the partial files that killed writers left in `folder`.

  Call it only while nobody writes there.
  """
  for partial in pathlib.Path(folder).glob('.*.partial'):
    partial.unlink(missing_ok=True)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
  """Checks that a folder exists or can be made, and can be written.

  Args:
    name: the flag that gave the folder, for the error.
    path: the folder.

  Raises:
    ConfigError: the folder can be neither made nor written.
  """
  folder = pathlib.Path(path).absolute()
  nearest = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
  if not nearest.is_dir():
    reason = f'{nearest} is no folder'
  elif not os.access(nearest, os.W_OK | os.X_OK):
    reason = f'{nearest} is not writable'
  else:
    return
  raise errors.ConfigError(
    f'--{name}={path} cannot be written: {reason}; choose another folder'
  )
