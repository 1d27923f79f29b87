"""Paths as users give them, atomic writes, and checks of folders to write into.

A path is local or, as gs://BUCKET/NAME, an object of Google Cloud Storage. Such
a store has no folders, only names with slashes in them; an object appears whole
when its upload ends, and nothing can be appended to it or renamed in place.
What is written here is therefore whole or absent on either.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any, TypeAlias

# TensorFlow, where it is installed, would serve gs:// in place of gcsfs: it
# takes seconds to import, and its errors are none of Python's. epath reads this
# when it looks at its first path.
os.environ.setdefault('EPATH_USE_TF', 'false')

from etils import epath

from selfboottok_jax import errors

# Local paths stay pathlib's: epath's cannot be asked for a size where the user
# has no name, nor listed with all that is there.
Path: TypeAlias = pathlib.Path | epath.Path
Given: TypeAlias = str | os.PathLike[str]

# pathlib drops the second slash of a URL.
_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://+|(gs):/')
_BUCKET = re.compile(r'[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]')


def as_path(path: Given) -> Path:
  """Turns what a user gave into a path, with `~` expanded.

  Args:
    path: text, or a path of pathlib or epath. gs://BUCKET/NAME is in Google
      Cloud Storage; everything without such a beginning is local.

  Raises:
    ConfigError: a URL of another kind or without a bucket, or gs:// where the
      package that reads it is not installed.
  """
  text = os.fspath(path)
  match = _URL.match(text)
  if match is None:
    return pathlib.Path(os.path.expanduser(text))
  if (match[1] or match[2]) != 'gs':
    raise errors.ConfigError(
      f'{text} is of a kind that is not known; wanted a local path, or '
      'gs://BUCKET/NAME'
    )
  # Without '..' and doubled slashes, which an object store takes as they are.
  name = posixpath.normpath(text[match.end() :])
  if not _BUCKET.fullmatch(name.partition('/')[0]):
    raise errors.ConfigError(f'{text} names no bucket; wanted gs://BUCKET/NAME')
  if importlib.util.find_spec('gcsfs') is None:
    raise errors.ConfigError(
      f'{text} needs gcsfs, not installed here; wanted pip install '
      "'selfboottok_jax[gcs]', or a local path"
    )
  _see_what_others_write()
  return epath.Path(f'gs://{name}')


def is_remote(path: Path) -> bool:
  """True for an object store's path."""
  return not isinstance(path, pathlib.Path)


def local_path(name: str, path: Given, why: str) -> pathlib.Path:
  """Turns what a user gave into a local path, as `as_path` does.

  Args:
    name: the flag or key that gave it, for the error.
    path: what was given.
    why: the reason for which it must be local, and what to do: the end of the
      error.

  Raises:
    ConfigError: it is in an object store.
  """
  found = as_path(path)
  if isinstance(found, pathlib.Path):
    return found
  raise errors.ConfigError(f'{name}={path} is no local path; {why}')


def absolute(path: Given) -> Path:
  """Turns what a user gave into an absolute path, without symbolic links."""
  found = as_path(path)
  return found.resolve() if isinstance(found, pathlib.Path) else found


def make_folder(path: Given) -> Path:
  """Makes a folder and those above it; an object store has none to make."""
  found = as_path(path)
  if isinstance(found, pathlib.Path):
    found.mkdir(parents=True, exist_ok=True)
  return found


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
  """Turns failures of an object store into a UserError of one line.

  An absent file stays a FileNotFoundError, and nothing changes for local paths.
  """
  try:
    yield
  except (errors.UserError, FileNotFoundError):
    raise
  # Network, credentials and the clients for them have errors of their own.
  except Exception as error:
    if not is_remote(path):
      raise
    raise errors.UserError(
      f'{path} cannot be reached ({_reason(error)}); look at the name of the '
      'bucket, the network, and who you are there (gcloud auth '
      'application-default login)'
    ) from error


def exists(path: Path) -> bool:
  """True if there is such a file; UserError if a store cannot be reached."""
  with reaching(path):
    return path.exists()


def _reason(error: Exception) -> str:
  if isinstance(error, FileNotFoundError):
    return 'there is no such bucket'
  text = ' '.join(str(error).split())[:200]
  return text or type(error).__name__


def _see_what_others_write() -> None:
  """Makes clients of the object store list it whenever they are asked.

  They would keep listings for ever, and miss what other processes write.
  """
  import fsspec

  own = fsspec.config.conf.setdefault('gcs', {})
  own.setdefault('use_listings_cache', False)


def _store() -> Any:
  """The client of the object store, for what epath has no call of."""
  import fsspec

  return fsspec.filesystem('gcs')


def write_atomically(
  path: Given, data: bytes, *, durable: bool = False
) -> Path:
  """Writes a file so that readers see the old contents or the new, never half.

  Args:
    path: the file; missing folders are made.
    data: its contents.
    durable: whether to wait until the data is on the disk, so that the file
      survives a loss of power.

  Returns:
    The path.

  Raises:
    OSError: a local file cannot be written.
    UserError: an object cannot.
  """
  path = as_path(path)
  if not isinstance(path, pathlib.Path):
    with reaching(path):
      # One call: a file object that is closed by an error would leave what it
      # has so far under the name.
      _store().pipe_file(os.fspath(path), data)
    return path
  with writing(path) as file:
    file.write(data)
    if durable:
      file.flush()
      os.fsync(file.fileno())
  return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
  """Opens a file that gets its name when the block ends without an error.

  Until then it has a hidden one, in the same folder: a rename is atomic within
  one file system only. An object is copied to its name by the store itself,
  however large it is. Objects can be written from the start to the end only.
  """
  # Hosts that share a folder may have processes of the same number.
  partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.partial')
  make_folder(path.parent)
  try:
    with partial.open('wb') as file:
      yield file
    if isinstance(path, pathlib.Path):
      os.replace(partial, path)
    else:
      _store().mv(os.fspath(partial), os.fspath(path))
  except BaseException:
    with contextlib.suppress(Exception):
      partial.unlink()
    raise


def write_json(
  path: Given,
  content: Any,
  *,
  durable: bool = False,
  sort_keys: bool = False,
) -> Path:
  """Writes indented JSON; see `write_atomically`."""
  text = json.dumps(content, indent=2, sort_keys=sort_keys)
  return write_atomically(path, f'{text}\n'.encode(), durable=durable)


def children(folder: Given) -> list[Path]:
  """What a folder holds, in no order; [] if it is absent.

  Raises:
    UserError: an object store that cannot be reached.
  """
  path = as_path(folder)
  if isinstance(path, pathlib.Path):
    return list(path.iterdir()) if path.is_dir() else []
  # Not by epath, which takes a store that cannot be reached for an absent
  # folder, and the folders that the web console makes, as empty objects of that
  # name, for a child of theirs.
  own = os.fspath(path).removeprefix('gs://')
  try:
    with reaching(path):
      names = _store().ls(own, detail=False)
  except FileNotFoundError:
    return []
  return [epath.Path(f'gs://{name}') for name in names if name != own]


def is_vacant(folder: Given) -> bool:
  """True if a folder is absent or holds nothing but hidden files.

  A command that was killed at its start leaves hidden partial files behind.
  """
  path = as_path(folder)
  if isinstance(path, pathlib.Path) and path.exists() and not path.is_dir():
    raise NotADirectoryError(f'{path} is no folder')
  return all(child.name.startswith('.') for child in children(path))


def remove_partials(folder: Given) -> None:
  """Removes the partial files that killed writers left in `folder`.

  Call it only while nobody writes there.
  """
  for child in children(folder):
    if child.name.startswith('.') and child.name.endswith('.partial'):
      child.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
  """Removes a folder with all that is in it, as far as possible."""
  if isinstance(folder, pathlib.Path):
    shutil.rmtree(folder, ignore_errors=True)
    return
  with reaching(folder):
    folder.rmtree(missing_ok=True)


def check_folder(name: str, path: Given) -> None:
  """Checks that a folder exists or can be made, and can be written.

  In an object store an empty object is written and removed again: nothing else
  tells whether that is allowed.

  Args:
    name: the flag that gave the folder, for the error.
    path: the folder.

  Raises:
    ConfigError: the folder can be neither made nor written.
  """
  given = as_path(path)
  if not isinstance(given, pathlib.Path):
    _check_remote(name, given)
    return
  folder = given.absolute()
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


def check_file(name: str, path: Given) -> None:
  """Checks that a file can be written, in a folder that need not exist.

  Args:
    name: the flag that gave the file, for the error.
    path: the file; an existing one would be replaced.

  Raises:
    ConfigError: it cannot be written, or is a folder.
  """
  given = as_path(path)
  if isinstance(given, pathlib.Path) and given.is_dir():
    raise errors.ConfigError(
      f'--{name}={path} is a folder; wanted a file, as {given / "NAME"}'
      f'{given.suffix}'
    )
  reason = ''
  try:
    check_folder(name, given.parent)
    if isinstance(given, pathlib.Path):
      parents = given.absolute().parents
      # What a system may refuse even to those who have the right to write.
      tempfile.TemporaryFile(dir=next(p for p in parents if p.is_dir())).close()
  except errors.ConfigError as error:
    reason = str(error).partition(' cannot be written: ')[2].partition('; ')[0]
  except OSError as error:
    reason = error.strerror or str(error)
  if reason:
    raise errors.ConfigError(
      f'--{name}={path} cannot be written: {reason}; choose another place'
    )


def _check_remote(name: str, folder: epath.Path) -> None:
  """Raises ConfigError unless objects can be written under a name."""
  probe = folder / f'.{uuid.uuid4().hex}.partial'
  try:
    _store().pipe_file(os.fspath(probe), b'')
    probe.unlink()
  # As in `reaching`; absent buckets too.
  except Exception as error:
    raise errors.ConfigError(
      f'--{name}={folder} cannot be written: {_reason(error)}; look at the '
      'name of the bucket, the network, and who you are there (gcloud auth '
      'application-default login)'
    ) from error
