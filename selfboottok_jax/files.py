"""Files that appear whole or not at all, and folders that can take them."""

import contextlib
import os
import pathlib

from selfboottok_jax import errors


def write_atomically(
  path: str | os.PathLike[str], data: bytes, *, durable: bool = False
) -> pathlib.Path:
  """Writes `data` beside `path`, then renames: readers see old or new.

  Missing folders are made. A `durable` file survives a loss of power too.
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


def is_vacant(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder is absent or holds nothing but hidden files.

  Those are what a command that was killed at its start has left.
  """
  path = pathlib.Path(folder)
  return not path.exists() or all(p.name[0] == '.' for p in path.iterdir())


def remove_partials(folder: str | os.PathLike[str]) -> None:
  """Removes what writers that were killed left in `folder`.

  Only for a time when nobody writes there.
  """
  for partial in pathlib.Path(folder).glob('.*.partial'):
    partial.unlink(missing_ok=True)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
  """Checks that a folder exists or can be made, and can be written.

  Args:
    name: the flag that named the folder, for the error.
    path: the folder.

  Raises:
    ConfigError: it can be neither made nor written; says why.
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
