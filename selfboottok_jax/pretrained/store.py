"""Parameters of published networks, imported once and kept.

The cache is the folder that the environment variable SELFBOOTTOK_CACHE names,
else selfboottok_jax in XDG_CACHE_HOME, else ~/.cache/selfboottok_jax. In it are

  weights/NAME-HASH/  imported parameters, see `entries`
  weights/index/      which of them came from which repository of the hub
  hub/                downloads, in the layout of huggingface_hub
  files/NAME/         files that were brought by hand

The hash is that of the source files' content and of what else the parameters
depend on: a file that changed is another entry. Entries are never changed. They
are checked whenever they are read; a damaged one is imported again from its
source. Everything here can be deleted at any time.
"""

import contextlib
import contextvars
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.pretrained import entries, hub, sources, weight_files
from selfboottok_jax.pretrained import published as published_lib

# To be counted up when the same file would give other parameters.
FORMAT = 1

Read = Callable[[dict[str, np.ndarray], str], PyTree]

_imported: contextvars.ContextVar[list[dict[str, Any]] | None] = (
  contextvars.ContextVar('imported', default=None)
)


def cache_folder() -> pathlib.Path:
  """Where the cache is; it need not exist."""
  if folder := os.environ.get('SELFBOOTTOK_CACHE'):
    return pathlib.Path(folder).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'selfboottok_jax'


@contextlib.contextmanager
def watch() -> Iterator[list[dict[str, Any]]]:
  """Collects the record of whatever `load` gives out inside the block.

  A record has 'params', the path of the safetensors file, besides.
  """
  records: list[dict[str, Any]] = []
  token = _imported.set(records)
  try:
    yield records
  finally:
    _imported.reset(token)


def find(
  name: str, source: str, published: published_lib.Published | None
) -> sources.Local | sources.Hub:
  """What `load` would read; WeightsError as `sources.resolve`."""
  inbox = cache_folder() / 'files' / name
  return sources.resolve(name, source, published, inbox)


def load(
  name: str,
  source: str,
  published: published_lib.Published | None,
  shape_key: Mapping[str, Any],
  read: Read,
  part: str = '',
) -> PyTree:
  """Parameters of a network, from the cache or from their source.

  A file that `launch.convert` wrote is a source too, for the same network and
  shape_key; it is read as it is.

  Args:
    name: the network.
    source: see `sources`.
    published: where its weights are published; None where nobody publishes any.
    shape_key: what the parameters depend on besides the files, as a grid that
      positions are resized to; of numbers, texts, lists and dicts.
    read: makes parameters of the arrays of all files and of a text that names
      them in errors; may raise WeightsError.
    part: which state dict of a checkpoint, see `files.read`.

  Returns:
    Nested dicts of float32 numpy arrays.

  Raises:
    WeightsError: no such source, a file that is damaged, of another network or
      more than arrays, no connection, or a cache that cannot be written. The
      cache is then as it was, but for downloads that are complete.
  """
  cache = cache_folder()
  place = find(name, source, published)
  wanted = {
    'format': FORMAT,
    'network': name,
    'shape_key': json.loads(json.dumps(dict(shape_key))),
    'part': part,
  }
  if isinstance(place, sources.Hub):
    flat = _load_hub(cache, wanted, place, read)
  elif (record := entries.record_of(place.files[0])) is not None:
    flat = _load_converted(place.files[0], record, wanted)
  else:
    paths = {str(path): path for path in place.files}
    _, flat = _load_files(cache, wanted, place.label, paths, read)
  return entries.unflatten(flat)


def _load_hub(cache, wanted, place, read):
  """The entry that came from a repository before, else its files."""
  network = wanted['network']
  key = _hash({**wanted, 'source': place.label, 'files': place.files})
  index = cache / 'weights' / 'index' / f'{network}-{key}.json'
  entry = _indexed(index)
  flat = entries.read(entry) if entry else None
  if flat is not None:
    _note(entry / entries.PARAMS)
    return flat
  is_damaged = entry is not None and entry.exists()
  try:
    paths = hub.download(network, place, cache / 'hub')
  except errors.WeightsError as error:
    if not is_damaged:
      raise
    raise errors.WeightsError(
      f'{entry} is damaged and cannot be made again: {error}'
    ) from error
  entry, flat = _load_files(cache, wanted, place.label, paths, read)
  with _writing(cache):
    _write_index(index, {'entry': entry.name, 'source': place.label})
  return flat


def _load_converted(path, record, wanted):
  """A file that was imported elsewhere."""
  given = {key: record.get(key) for key in wanted}
  if given != wanted:
    raise errors.WeightsError(
      f'{path} was converted for {_told(given)}, wanted one for '
      f'{_told(wanted)}; convert the original file again, with the options of '
      'the latter as --options=NAME=VALUE,...'
    )
  flat = weight_files.read(path)
  beside = path.with_name(entries.RECORD)
  if path.name == entries.PARAMS and beside.exists():
    flat = entries.read(path.parent)
  if flat is None:
    raise errors.WeightsError(
      f'{path} is not the file of its {beside.name}; copy both again'
    )
  _note(path)
  return flat


def _load_files(cache, wanted, label, paths, read):
  """The entry of these files, which is made where there is none."""
  digests = entries.digests(paths)
  key = _hash({**wanted, 'files': sorted(digests.values())})
  entry = cache / 'weights' / f'{wanted["network"]}-{key}'
  flat = entries.read(entry)
  if flat is None:
    flat = entries.flatten(
      read(weight_files.read_all(paths, wanted['part']), label)
    )
    if digests != entries.digests(paths):
      raise errors.WeightsError(
        f'{label} changed while it was read; wait until it is complete'
      )
    with _writing(cache):
      entries.write(entry, flat, {**wanted, 'source': label, 'files': digests})
  _note(entry / entries.PARAMS)
  return entry, flat


@contextlib.contextmanager
def _writing(cache: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise errors.WeightsError(
      f'the cache {cache} cannot be written ({error}); set SELFBOOTTOK_CACHE '
      'to a folder with room that can'
    ) from error


def _indexed(index: pathlib.Path) -> pathlib.Path | None:
  """The entry that an index file names; None where there is none."""
  try:
    return index.parents[1] / json.loads(index.read_text())['entry']
  except (OSError, ValueError, LookupError, TypeError):
    return None


def _write_index(index: pathlib.Path, content: Mapping[str, str]) -> None:
  index.parent.mkdir(parents=True, exist_ok=True)
  part = index.with_name(f'.{index.name}.{uuid.uuid4().hex}')
  part.write_text(json.dumps(content) + '\n')
  os.replace(part, index)


def _note(path: pathlib.Path) -> None:
  """Tells `watch` of a file that was used."""
  records = _imported.get()
  if records is not None:
    records.append({**(entries.record_of(path) or {}), 'params': str(path)})


def _hash(value: Mapping[str, Any]) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _told(wanted: Mapping[str, Any]) -> str:
  options = ' '.join(f'{k}={v}' for k, v in (wanted['shape_key'] or {}).items())
  return f'{wanted["network"]} (format {wanted["format"]}, {options or "-"})'
