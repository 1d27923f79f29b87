"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib


def write_atomically(path: str | os.PathLike[str], data: bytes) -> pathlib.Path:
  """Writes `data` beside `path`, then renames: readers see old or new.

  Missing folders are made.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, as a rename is atomic within one file system only.
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    partial.write_bytes(data)
    os.replace(partial, path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise
  return path
