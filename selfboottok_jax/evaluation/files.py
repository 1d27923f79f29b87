"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib


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
