"""The files of a token cache, a folder that `launch.encode` wrote.

  cache.json                          the index
  train-00003-of-00010.array_record   a record for every image of a shard
  train-00003-of-00010.json           size and sums of that shard
  train.json                          all shards are there; their statistics

Each appears whole or not at all. The last two repeat a digest of the index.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from selfboottok_jax import errors
from selfboottok_jax.data.latent_index import VERSION, Index

INDEX = 'cache.json'
Path = str | os.PathLike[str]

AGAIN = 'run launch.encode again with the same flags'
# What an object of another form raises when it is taken for an index.
_NO_INDEX = (
  AttributeError, IndexError, KeyError, TypeError, ValueError,
  errors.ConfigError,
)  # fmt: skip


def record_file(
  folder: Path, index: Index, split: str, shard: int
) -> pathlib.Path:
  """Where the records of a shard lie; the file beside it ends in .json."""
  shards = index.splits[split].shards
  name = f'{split}-{shard:05d}-of-{shards:05d}.array_record'
  return pathlib.Path(folder, name)


def split_file(folder: Path, split: str) -> pathlib.Path:
  """What says that a split is complete."""
  return pathlib.Path(folder, f'{split}.json')


def read_index(folder: Path) -> Index:
  """Reads cache.json; DataError where there is none, or another's."""
  path = pathlib.Path(folder, INDEX)
  if not path.is_file():
    raise errors.DataError(
      f'{folder} is no token cache: it has no {INDEX}; wanted the --out of '
      'launch.encode'
    )
  told = read_json(path)
  if told.get('version') != VERSION:
    raise errors.DataError(
      f'{path} is of version {told.get("version")!r}; wanted {VERSION}: encode '
      'into a new folder'
    )
  try:
    return Index.from_json(told)
  except _NO_INDEX as error:
    raise damaged(path, error) from error


def agree(folder: Path, given: Index) -> Index:
  """The index under which `given` may be written into a folder.

  That is `given` with the other splits that are there already. Nothing is
  written yet.

  Raises:
    ConfigError: the folder holds something else; says what differs.
    DataError: its index is damaged.
  """
  path = pathlib.Path(folder)
  if not (path / INDEX).exists():
    # Hidden files are those of a command that was killed at its start.
    if path.exists() and any(p for p in path.iterdir() if p.name[0] != '.'):
      raise errors.ConfigError(
        f'--out={folder} is not empty and holds no {INDEX}; choose a new '
        'folder, nothing is overwritten'
      )
    return given
  there = read_index(path)
  differences = there.differences(given)
  if differences:
    hidden = len(differences) - 3
    more = f'; and {hidden} more' if hidden > 0 else ''
    raise errors.ConfigError(
      f'--out={folder} holds a cache of other settings: '
      f'{"; ".join(differences[:3])}{more}; give the same, or choose another '
      'folder'
    )
  return dataclasses.replace(given, splits={**there.splits, **given.splits})


def write_index(folder: Path, index: Index) -> None:
  """Makes the folder and its index."""
  path = pathlib.Path(folder, INDEX)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, index.to_json())


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """An object of a file; DataError for anything else."""
  try:
    told = json.loads(path.read_bytes())
    if not isinstance(told, dict):
      raise ValueError('it holds no object')
  except (OSError, ValueError) as error:
    raise damaged(path, error) from error
  return told


def write_json(path: pathlib.Path, told: Mapping[str, Any]) -> None:
  """Writes beside `path` and renames: readers see the old file or the new.

  A file that says the same already stays as it is.
  """
  text = json.dumps(told, indent=2) + '\n'
  if path.is_file() and path.read_bytes() == text.encode():
    return
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with partial.open('w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise


def damaged(path: pathlib.Path, error: Exception) -> errors.DataError:
  """The error for a file whose contents are not those that were written."""
  # Without the index nobody knows what the other files are.
  remedy = (
    'restore it, or encode into a new folder'
    if path.name == INDEX
    else f'delete it and {AGAIN}'
  )
  reason = ' '.join(str(error).split())[:80] or type(error).__name__
  return errors.DataError(f'{path} is damaged ({reason}); {remedy}')
