"""Parameters of published networks, imported once and kept.

The cache is the folder in the environment variable SELFBOOTTOK_CACHE, else
selfboottok_jax in XDG_CACHE_HOME, else ~/.cache/selfboottok_jax. It holds

  weights/NAME-HASH/  imported parameters: params.safetensors and record.json
  weights/index/      the entry that came from each repository of the hub
  hub/                downloads, in the layout of huggingface_hub
  files/NAME/         files that were brought by hand

The hash is that of the source files' content and of all else that the
parameters depend on: a file that changed is another entry. Entries never
change. They are checked whenever they are read; a damaged one is imported again
from its source. Everything here can be deleted at any time.

Arrays in params.safetensors are named by the keys of the parameters, joined by
'/'. The record (network, source, SHA-256 of each of its files, all else that
the parameters depend on) is in its header too, so that this file alone can be
carried to another machine; record.json also has the SHA-256 of that file.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from absl import logging
from jaxtyping import PyTree
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors, files, trees
from selfboottok_jax.pretrained import contract, sources, weight_files

PARAMS, RECORD = 'params.safetensors', 'record.json'
_DAMAGE = (OSError, ValueError, LookupError, TypeError, errors.WeightsError)
# Seconds after which nobody can still be writing.
_ABANDONED = 24 * 3600
# Key of the record in the header.
_HEADER = 'selfboottok_jax'


def sha256(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def digests(paths: Mapping[str, pathlib.Path]) -> dict[str, str]:
  """SHA-256 of files, by their names; WeightsError if one is unreadable."""
  try:
    return {name: sha256(path) for name, path in paths.items()}
  except OSError as error:
    raise errors.WeightsError(
      f'{error.filename} cannot be read ({error.strerror}); make it readable, '
      'or give another file'
    ) from error


def as_arrays(params: PyTree) -> dict[str, np.ndarray]:
  """Parameters as the arrays of an entry: float32 copies, keys joined by '/'.

  Raises:
    ValueError: a key that is no text or has a '/'.
  """
  _check_keys(params)
  return {
    # A copy: the leaf may be a view of a mapped file, which may change, and
    # safetensors writes bytes as they lie, transposed ones wrongly.
    name: np.array(leaf, np.float32, order='C')
    for name, leaf in trees.flatten(params, '/').items()
  }


def _check_keys(params: PyTree) -> None:
  for key, value in params.items():
    if not isinstance(key, str) or '/' in key:
      raise ValueError(f"parameters have the key {key!r}; wanted no '/' in it")
    if isinstance(value, Mapping):
      _check_keys(value)


def write_entry(
  folder: pathlib.Path,
  flat: Mapping[str, np.ndarray],
  record: Mapping[str, Any],
) -> None:
  """Writes an entry, all of it or nothing.

  A damaged entry is replaced; an intact one stays: another process was first.

  Raises:
    OSError: the folder cannot be written.
  """
  _sweep(folder.parent)
  part = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}')
  try:
    part.mkdir(parents=True)
    metadata = {_HEADER: json.dumps(record)}
    try:
      safetensors_numpy.save_file(dict(flat), part / PARAMS, metadata)
    except safetensors.SafetensorError as error:
      raise OSError(str(error)) from error
    whole = {**record, 'params_sha256': sha256(part / PARAMS)}
    (part / RECORD).write_text(json.dumps(whole, indent=2) + '\n')
    # safetensors makes a file private; a cache may be shared.
    shutil.copymode(part / RECORD, part / PARAMS)
    _put_in_place(part, folder)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _sweep(folder: pathlib.Path) -> None:
  """Removes half-written entries of processes that were killed long ago."""
  for part in folder.glob('.*.*'):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - part.stat().st_mtime > _ABANDONED:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames a folder into place, unless an intact entry is there."""
  if folder.exists() and read_entry(folder) is None:
    aside = part.with_name(f'{part.name}.damaged')
    with contextlib.suppress(FileNotFoundError):
      os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
  try:
    os.replace(part, folder)
  except OSError:
    if read_entry(folder) is None:
      raise


def read_entry(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
  """Reads the arrays of an entry, by flat name; None if missing or damaged."""
  if not folder.exists():
    return None
  try:
    wanted = json.loads((folder / RECORD).read_text())['params_sha256']
    if sha256(folder / PARAMS) != wanted:
      raise ValueError(f'{PARAMS} is not the file of its record')
    return weight_files.read(folder / PARAMS)
  except _DAMAGE as error:
    logging.warning('%s is damaged (%s)', folder, error)
    return None


def record_of(path: pathlib.Path) -> dict[str, Any] | None:
  """The record in a file's header; None for a file that we did not write."""
  text = weight_files.metadata(path).get(_HEADER)
  try:
    record = json.loads(text) if text else None
  except ValueError:
    return None
  return record if isinstance(record, dict) else None


# Version of the import: counted up when one file would give other parameters.
FORMAT = 1

Read = Callable[[dict[str, np.ndarray], str], PyTree]

_imported: contextvars.ContextVar[list[dict[str, Any]] | None] = (
  contextvars.ContextVar('imported', default=None)
)


def cache_folder() -> pathlib.Path:
  """Folder of the cache; it need not exist."""
  if folder := os.environ.get('SELFBOOTTOK_CACHE'):
    return files.local_path('SELFBOOTTOK_CACHE', folder, weight_files.ELSEWHERE)
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(os.path.expanduser(base)) / 'selfboottok_jax'


@contextlib.contextmanager
def watch() -> Iterator[list[dict[str, Any]]]:
  """Collects the records of all that `load` returns inside the block.

  A record also has 'params', the path of the safetensors file.
  """
  records: list[dict[str, Any]] = []
  token = _imported.set(records)
  try:
    yield records
  finally:
    _imported.reset(token)


def find(
  name: str, source: str, published: contract.Published | None
) -> sources.LocalFiles | sources.HubFiles:
  """The files that `load` would read; WeightsError as `sources.resolve`."""
  inbox = cache_folder() / 'files' / name
  return sources.resolve(name, source, published, inbox)


def fetch(
  name: str,
  source: str,
  published: contract.Published | None,
  *beside: str,
) -> tuple[pathlib.Path, ...]:
  """Files of a network on this machine; may download.

  Args:
    name: the network.
    source: see `sources`.
    published: place of its weights; None where none is published.
    *beside: names of files beside the weights.

  Returns:
    The weight files, and those beside the first, which need not exist for a
    source on this machine.

  Raises:
    WeightsError: no such source, or no connection.
  """
  place = find(name, source, published)
  if isinstance(place, sources.HubFiles):
    wanted = dataclasses.replace(place, files=(*place.files, *beside))
    found = sources.download(name, wanted, cache_folder() / 'hub')
    return tuple(found.values())
  return *place.files, *(place.files[0].with_name(b) for b in beside)


def is_at_hand(
  name: str,
  source: str,
  published: contract.Published | None,
  shape_key: Mapping[str, Any],
) -> bool:
  """True if `load` would find its files on this machine."""
  try:
    place = find(name, source, published)
  except errors.WeightsError:
    return False
  if isinstance(place, sources.LocalFiles):
    return True
  entry = _indexed(_index(cache_folder(), _wanted(name, shape_key), place))
  return entry is not None and entry.exists()


def load(
  name: str,
  source: str,
  published: contract.Published | None,
  shape_key: Mapping[str, Any],
  read: Read,
) -> PyTree:
  """Parameters of a network, from the cache or from their source.

  A file that `launch.convert` wrote is a source too, for the same network and
  shape_key; it is read as it is.

  Args:
    name: the network.
    source: see `sources`.
    published: place of its weights; None where none is published.
    shape_key: all that the parameters depend on besides the files, as a grid
      to which positions are resized; made of numbers, texts, lists and dicts.
    read: makes parameters of the arrays of all files and of a text that names
      them in errors; may raise WeightsError.

  Returns:
    Nested dicts of float32 numpy arrays.

  Raises:
    WeightsError: no such source, a file that is damaged, of another network or
      more than arrays, no connection, or a cache that cannot be written. The
      cache is then as it was, but for downloads that are complete.
  """
  cache = cache_folder()
  place = find(name, source, published)
  wanted = _wanted(name, shape_key)
  if isinstance(place, sources.HubFiles):
    flat = _load_hub(cache, wanted, place, read)
  elif (record := record_of(place.files[0])) is not None:
    flat = _load_converted(place.files[0], record, wanted)
  else:
    paths = {str(path): path for path in place.files}
    _, flat = _load_files(cache, wanted, place.label, paths, read)
  return trees.unflatten(flat, '/')


def _wanted(name: str, shape_key: Mapping[str, Any]) -> dict[str, Any]:
  """All that an entry depends on besides its source."""
  return {
    'format': FORMAT,
    'network': name,
    'shape_key': json.loads(json.dumps(dict(shape_key))),
    # A key of entries that exist: without it none of them would be found.
    'part': '',
  }


def _index(
  cache: pathlib.Path, wanted: Mapping[str, Any], place: sources.HubFiles
) -> pathlib.Path:
  """The file that names the entry of a repository."""
  key = _hash({**wanted, 'source': place.label, 'files': place.files})
  return cache / 'weights' / 'index' / f'{wanted["network"]}-{key}.json'


def _load_hub(
  cache: pathlib.Path,
  wanted: Mapping[str, Any],
  place: sources.HubFiles,
  read: Read,
) -> dict[str, np.ndarray]:
  """Arrays of the entry that came from a repository before, or of its files."""
  network = wanted['network']
  index = _index(cache, wanted, place)
  entry = _indexed(index)
  flat = read_entry(entry) if entry else None
  if entry is not None and flat is not None:
    _note(entry / PARAMS)
    return flat
  is_damaged = entry is not None and entry.exists()
  try:
    paths = sources.download(network, place, cache / 'hub')
  except errors.WeightsError as error:
    if not is_damaged:
      raise
    raise errors.WeightsError(
      f'{entry} is damaged and cannot be made again: {error}'
    ) from error
  entry, flat = _load_files(cache, wanted, place.label, paths, read)
  with _writing(cache):
    content = {'entry': entry.name, 'source': place.label}
    files.write_atomically(index, f'{json.dumps(content)}\n'.encode())
  return flat


def _load_converted(
  path: pathlib.Path, record: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Reads a file of `launch.convert`, if it is of this network and options."""
  given = {key: record.get(key) for key in wanted}
  if given != wanted:
    raise errors.WeightsError(
      f'{path} was converted for {_describe(given)}, wanted one for '
      f'{_describe(wanted)}; convert the original file again, with the options '
      'of the latter as --options=NAME=VALUE,...'
    )
  flat: dict[str, np.ndarray] | None = weight_files.read(path)
  beside = path.with_name(RECORD)
  if path.name == PARAMS and beside.exists():
    flat = read_entry(path.parent)
  if flat is None:
    raise errors.WeightsError(
      f'{path} is not the file of its {beside.name}; copy both again'
    )
  _note(path)
  return flat


def _load_files(
  cache: pathlib.Path,
  wanted: Mapping[str, Any],
  label: str,
  paths: Mapping[str, pathlib.Path],
  read: Read,
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
  """The entry of these files, made if there is none, and its arrays."""
  before = digests(paths)
  key = _hash({**wanted, 'files': sorted(before.values())})
  entry = cache / 'weights' / f'{wanted["network"]}-{key}'
  flat = read_entry(entry)
  if flat is None:
    arrays = weight_files.read_all(paths)
    flat = as_arrays(read(arrays, label))
    if before != digests(paths):
      raise errors.WeightsError(
        f'{label} changed while it was read; wait until it is complete'
      )
    with _writing(cache):
      write_entry(entry, flat, {**wanted, 'source': label, 'files': before})
  _note(entry / PARAMS)
  return entry, flat


@contextlib.contextmanager
def _writing(cache: pathlib.Path) -> Iterator[None]:
  """Turns a failure to write into a WeightsError."""
  try:
    yield
  except OSError as error:
    raise errors.WeightsError(
      f'the cache {cache} cannot be written ({error}); set SELFBOOTTOK_CACHE '
      'to a folder with room that can'
    ) from error


def _indexed(index: pathlib.Path) -> pathlib.Path | None:
  """Reads the entry that an index file names; None if there is none."""
  try:
    return index.parents[1] / json.loads(index.read_text())['entry']
  except (OSError, ValueError, LookupError, TypeError):
    return None


def _note(path: pathlib.Path) -> None:
  """Reports a file that was used to `watch`."""
  records = _imported.get()
  if records is not None:
    records.append({**(record_of(path) or {}), 'params': str(path)})


def _hash(value: Mapping[str, Any]) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(wanted: Mapping[str, Any]) -> str:
  """Network, format and options in one line."""
  options = ' '.join(f'{k}={v}' for k, v in (wanted['shape_key'] or {}).items())
  return f'{wanted["network"]} (format {wanted["format"]}, {options or "-"})'


def export(params: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Copies imported parameters and their record to a new place.

  Args:
    params: path of an entry's safetensors file, see `watch`.
    out: a folder, or a .safetensors file.

  Returns:
    The path of the copy, which is a source for the same network.

  Raises:
    ConfigError: the place is taken or cannot be written.
  """
  check_new(out)
  is_file = out.suffix == '.safetensors'
  path = out if is_file else out / PARAMS
  record = out.with_suffix('.json') if is_file else out / RECORD
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(params, path)
    digest = {'params_sha256': sha256(path)}
    files.write_json(record, (record_of(path) or {}) | digest)
  except OSError as error:
    raise errors.ConfigError(
      f'--out={out} cannot be written ({error.strerror}); choose another place'
    ) from error
  return path


def check_new(out: pathlib.Path) -> None:
  """Raises ConfigError unless `export` can write to `out`."""
  if out.suffix in weight_files.SUFFIXES and out.suffix != '.safetensors':
    raise errors.ConfigError(
      f'--out={out}: parameters are written as .safetensors alone; choose such '
      'a name, or a folder'
    )
  is_file = out.suffix == '.safetensors'
  taken = [p for p in (out, out.with_suffix('.json')) if p.exists()]
  if taken if is_file else out.is_dir() and any(out.iterdir()):
    raise errors.ConfigError(
      f'--out={out} is there already; choose a new one, nothing is overwritten'
    )
  files.check_folder('out', out.parent if is_file else out)
