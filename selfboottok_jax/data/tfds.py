"""Photographs of TensorFlow Datasets, prepared as ArrayRecord.

TFDS reads those without TensorFlow, which is never imported. Pictures are not
decoded by TFDS, so that they are the same as from any other form.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from selfboottok_jax import errors, files
from selfboottok_jax.data import (
  classes,
  packed_names,
  picture_set,
  roles,
)

PREFIX = 'tfds:'
_LABELS = ('label', 'labels', 'fine_label')
_INFO = 'dataset_info.json'
_NAME = re.compile(r'(\w+)(?:/([^:/]+))?(?::([0-9*]+(?:\.[0-9*]+){2}))?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
# Records that are read together for their labels.
_CHUNK = 64
_REPORTED = 100_000


def matches(path: str) -> bool:
  """Returns True for `tfds:NAME[/config][:version]` or `tfds:FOLDER`."""
  return path.startswith(PREFIX)


def open_tfds(path: str) -> picture_set.PictureSet:
  """Lists the pictures of a data set that TFDS has prepared.

  Labels are inside the records, beside the pictures. They are read once, which
  takes as long as reading the data set, and are then kept in the user's cache
  folder, together with the pictures' sizes, until a shard's name, size or time
  changes. The fingerprint is that of sizes, labels and order.

  Args:
    path: `tfds:NAME[/config][:version]`, looked for below the environment
      variable TFDS_DATA_DIR or ~/tensorflow_datasets; without a config the
      default one or the only one, without a version the highest one. Or
      `tfds:FOLDER`, the folder of a prepared data set.

  Raises:
    DataError: it is not prepared, or as something else than ArrayRecord; shards
      are missing; no single feature is the picture.
  """
  folder = _find(path)
  builder = _open_builder(folder, path)
  image = _image_feature(builder.info.features, path)
  label, names, notes = _label_feature(builder.info.features)
  full = [n for n, split in builder.info.splits.items() if split.num_examples]
  plan, tables = _read_splits(full, folder, image, label, builder, path)
  used = {name for names in plan.parts.values() for name in names}
  if left := [name for name in full if name not in used]:
    notes.append(f'splits that are left out: {", ".join(left)}')
  parts = {split: chosen[0] for split, chosen in plan.parts.items() if chosen}
  everything = np.concatenate(list(tables.values()))
  listed = packed_names.PackedNames(
    f'{part}/{index}'
    for part, table in tables.items()
    for index in range(len(table))
  )
  labelled = classes.none(len(everything))
  if label:
    labelled = classes.from_numbers(
      everything[:, 1], names, lambda index: f'{path}/{listed[index]}'
    )
  starts = np.cumsum([0, *map(len, tables.values())])
  inside = np.arange(len(everything)) - np.repeat(starts[:-1], np.diff(starts))
  part_of = np.repeat(np.arange(len(tables)), np.diff(starts))
  is_val = plan.find_val(list(tables), part_of, lambda: listed)
  is_full = everything[:, 0] > 0
  splits = {}
  for split in picture_set.SPLITS:
    indices = np.flatnonzero((is_val == (split == 'val')) & is_full)
    part = parts.get('train' if plan.is_held_out else split, '')
    records = _Records(folder, part, image, label)
    reader = TfdsReader(records, inside[indices], path)
    kept, sizes = listed.take(indices), everything[indices, 0]
    labels = labelled.labels[indices]
    digest = picture_set.digest(labelled.names, kept, sizes, labels)
    splits[split] = picture_set.Split(kept, sizes, labels, reader, digest)
  return picture_set.PictureSet(
    path,
    splits,
    labelled.names,
    plan.origin,
    (*notes, *labelled.notes),
    bad=tuple(
      picture_set.Bad(listed[int(index)], 'the file is empty')
      for index in np.flatnonzero(~is_full)
    ),
  )


def _import() -> Any:
  """Returns tensorflow_datasets."""
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise errors.DataError(
      'data sets of TFDS are read with tensorflow-datasets, which is missing '
      f"({error}); pip install 'selfboottok_jax[tfds]'"
    ) from error
  return tensorflow_datasets


def _data_dir() -> str:
  """Where TFDS keeps what it has prepared."""
  given = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return os.path.expanduser(given)


def _find(path: str) -> str:
  """The folder of a prepared data set; DataError if there is none."""
  name = path.removeprefix(PREFIX)
  given = os.path.expanduser(name)
  if os.path.isfile(os.path.join(given, _INFO)):
    return given
  match = _NAME.fullmatch(name)
  if match:
    root = os.path.join(_data_dir(), match[1])
    return _find_version(root, match[2] or '', match[3] or '', path, name)
  if '://' in name:
    raise errors.DataError(
      f'{path} is not on a disk of this machine, where ArrayRecord is read; '
      'copy the folder here and give its path'
    )
  if os.path.isdir(given):
    return _find_version(given, '', '', path, os.path.basename(given))
  raise errors.DataError(
    f'{path} is no data set; wanted tfds:NAME, tfds:NAME/CONFIG:VERSION, or '
    f'tfds:FOLDER of one that is prepared, with {_INFO} in it'
  )


def _find_version(
  root: str, config: str, version: str, path: str, name: str
) -> str:
  """Finds the folder of a version below that of a data set."""
  if not os.path.isdir(root):
    raise errors.DataError(
      f'{path} is not prepared: there is no {root}; {_advice(name)}'
    )
  there = sorted(
    entry.name
    for entry in os.scandir(root)
    if entry.is_dir() and not entry.name.startswith('.')
  )
  configs = [
    name
    for name in there
    if not _VERSION.fullmatch(name)
    and any(map(_VERSION.fullmatch, os.listdir(os.path.join(root, name))))
  ]
  if config or (configs and not any(map(_VERSION.fullmatch, there))):
    config = config or _default_config(root, configs, path)
    if config not in configs:
      raise errors.DataError(
        f'{path} is not prepared: {root} has the configurations '
        f'{", ".join(configs) or "of none"}; {_advice(name)}'
      )
    root = os.path.join(root, config)
    there = os.listdir(root)
  wanted = re.escape(version).replace(r'\*', r'\d+') or r'.*'
  versions = [
    each
    for each in there
    if _VERSION.fullmatch(each)
    and re.fullmatch(wanted, each)
    and os.path.isfile(os.path.join(root, each, _INFO))
  ]
  if not versions:
    raise errors.DataError(
      f'{path} is not prepared: {root} has '
      f'{", ".join(sorted(there)) or "nothing in it"}; {_advice(name)}'
    )
  highest = max(versions, key=lambda v: tuple(map(int, v.split('.'))))
  return os.path.join(root, highest)


def _default_config(root: str, configs: Sequence[str], path: str) -> str:
  """The configuration of a name without one."""
  if len(configs) == 1:
    return configs[0]
  try:
    text = pathlib.Path(root, '.config', 'metadata.json').read_text()
    default = json.loads(text)['default_config_name']
  except (OSError, ValueError, KeyError, TypeError):
    default = ''
  if default in configs:
    return default
  raise errors.DataError(
    f'{path} has the configurations {", ".join(configs)}; give one of them, as '
    f'{path.partition(":")[0]}:{os.path.basename(root)}/{configs[0]}'
  )


def _advice(name: str, folder: str = '') -> str:
  """How to prepare a data set in a form that is read."""
  where = f'data_dir={folder!r}, ' if folder else ''
  command = (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({name!r}, {where}file_format='array_record')"
    '.download_and_prepare()"'
  )
  then = f', and set TFDS_DATA_DIR={folder}' if folder else ''
  return f'prepare it with `{command}`{then}'


def _open_builder(folder: str, path: str) -> Any:
  """Opens what TFDS knows of a data set; DataError if it is not to be read."""
  tfds = _import()
  try:
    builder = tfds.builder_from_directory(folder)
  except Exception as error:  # noqa: BLE001 - of many kinds in damaged files.
    raise errors.DataError(
      f'{path}: TFDS cannot read {folder} ({_line(error)}); prepare it again'
    ) from error
  formats = [builder.info.file_format, *builder.info.alternative_file_formats]
  if 'array_record' not in [each.value for each in formats if each]:
    info = json.loads(pathlib.Path(folder, _INFO).read_text())
    name = '/'.join(filter(None, (info['name'], info.get('configName'))))
    version = info.get('version', '')
    beside = os.path.join(_data_dir(), 'array_record')
    raise errors.DataError(
      f'{path} is prepared as {info.get("fileFormat") or "tfrecord"}, which is '
      'not read in any order without TensorFlow; '
      f'{_advice(f"{name}:{version}", beside)}'
    )
  for name, split in builder.info.splits.items():
    if split.num_examples:
      # Where it is there in several formats, this chooses ours: splits have
      # other files from then on.
      builder.as_data_source(split=name)
  for split in builder.info.splits.values():
    for file in split.filepaths:
      if not os.path.isfile(file):
        raise errors.DataError(
          f'{path} lacks {file}; copy or download it again'
        )
  return builder


def _line(error: BaseException) -> str:
  """An error of TFDS, which may be long, on a line."""
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def _image_feature(features: Any, path: str) -> str:
  """The name of the pictures among features."""
  tfds = _import()
  found = [
    name
    for name, feature in dict(features).items()
    if isinstance(feature, tfds.features.Image)
  ]
  if 'image' in found or len(found) == 1:
    return 'image' if 'image' in found else found[0]
  listed = ', '.join(features)
  raise errors.DataError(
    f'{path} has {len(found)} images in a record, among {listed[:300]}; wanted '
    'a single one, or one that is called image'
  )


def _label_feature(features: Any) -> tuple[str, tuple[str, ...], list[str]]:
  """The name of the classes among features, '' without; their names; notes."""
  tfds = _import()
  found = {
    name: feature
    for name, feature in dict(features).items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  label = next((name for name in _LABELS if name in found), '')
  if not label and len(found) == 1:
    label = next(iter(found))
  others = [name for name in found if name != label]
  notes = []
  if not label:
    what = ', '.join(others) or 'the features'
    notes.append(f'no classes: of {what} none is named label')
    return '', (), notes
  if others:
    notes.append(f'classes are those of {label}, not of {", ".join(others)}')
  return label, tuple(map(str, found[label].names or ())), notes


def _read_splits(
  full: Sequence[str],
  folder: str,
  image: str,
  label: str,
  builder: Any,
  path: str,
) -> tuple[roles.Plan, dict[str, Int[np.ndarray, '_ 2']]]:
  """Chooses splits, at most one of each role, and reads their tables.

  A test split without labels, as those of competitions are, does not count.
  """
  plan = _plan(full, path)
  tables = {}
  for names in plan.parts.values():
    for name in names:
      records = _Records(folder, name, image, label)
      tables[name] = _read_table(records, builder, path)
  for name in plan.parts['val']:
    if roles.role(name) == 'test' and label and (tables[name][:, 1] < 0).all():
      others = [each for each in full if each != name]
      if others:
        return _read_splits(others, folder, image, label, builder, path)
  return plan, tables


def _plan(full: Sequence[str], path: str) -> roles.Plan:
  """Chooses among the splits that have records."""
  if not full:
    raise errors.DataError(f'{path} has no records; prepare it again')
  chosen: dict[str, str] = {}
  # A name that is a role goes before one that has it in it.
  for name in sorted(full, key=lambda name: not roles.folder_role(name)):
    role = roles.role(name)
    if role and role not in chosen.values():
      chosen[name] = role
  if not chosen:
    if len(full) > 1:
      raise errors.DataError(
        f'{path} has the splits {", ".join(full)}; wanted train, validation or '
        'test'
      )
    chosen = {full[0]: ''}
  return roles.plan(chosen, path, 'splits')


class _Records:
  """The records of a split, opened in each process when they are first read."""

  def __init__(self, folder: str, split: str, image: str, label: str):
    self.folder, self.split, self.image, self.label = (
      folder, split, image, label
    )  # fmt: skip
    self._start()

  def _start(self) -> None:
    self._lock = threading.Lock()
    self._source: Any = None

  def source(self) -> Any:
    """The data source of TFDS, whose pictures are encoded."""
    if self._source is None:
      with self._lock:
        if self._source is None:
          self._source = self._open()
    return self._source

  def _open(self) -> Any:
    tfds = _import()
    builder = tfds.builder_from_directory(self.folder)
    skip = {
      name: tfds.decode.SkipDecoding()
      for name, feature in dict(builder.info.features).items()
      if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split=self.split, decoders=skip)

  def __getstate__(self) -> dict[str, Any]:
    return {
      name: value
      for name, value in vars(self).items()
      if name not in ('_lock', '_source')
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._start()


class TfdsReader:
  """Reads the encoded pictures of some records."""

  def __init__(
    self, records: _Records, indices: Int[np.ndarray, '_'], path: str
  ):
    """Reads the records `indices`; `path` is that of the set, for errors."""
    self._records, self._indices, self._path = records, indices, path

  def __call__(self, index: int) -> bytes:
    """Returns the bytes of a picture; DataError if its shard is damaged."""
    number = int(self._indices[index])
    try:
      return self._records.source()[number][self._records.image]
    except Exception as error:  # noqa: BLE001 - of any kind, from C++.
      raise _unreadable(self._path, self._records, number, error) from error


def _unreadable(
  path: str, records: _Records, number: int, error: BaseException
) -> errors.DataError:
  return errors.DataError(
    f'{path}: records of {records.split} from {number} on cannot be read '
    f'({_line(error)}); the shards in {records.folder} are damaged: prepare '
    'them again'
  )


def _read_table(
  records: _Records, builder: Any, path: str
) -> Int[np.ndarray, 'n 2']:
  """Bytes and class number of each picture, from the cache if they are there.

  Without classes the second column is 0.
  """
  split = builder.info.splits[records.split]
  manifest = [builder.info.full_name, records.split, records.image]
  manifest += [records.label, *map(str, split.shard_lengths)]
  for file in split.filepaths:
    stat = os.stat(file)
    manifest.append(f'{file}\0{stat.st_size}\0{stat.st_mtime_ns}')
  key = hashlib.sha256('\n'.join(manifest).encode(*picture_set.UTF8))
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  file = pathlib.Path(cache, 'selfboottok_jax', f'tfds-{key.hexdigest()}.npy')
  count = split.num_examples
  try:
    kept = np.load(file)
    if kept.shape == (count, 2) and kept.dtype == np.int64:
      return kept
  except (OSError, ValueError, EOFError):
    pass
  table = _read_records(records, count, path)
  buffer = io.BytesIO()
  np.save(buffer, table)
  try:
    files.write_atomically(file, buffer.getvalue())
  except OSError as error:
    logging.warning(
      'the labels of %s are read again next time: %s', path, error
    )
  return table


def _read_records(
  records: _Records, count: int, path: str
) -> Int[np.ndarray, 'n 2']:
  """Reads all records, without decoding pictures."""
  source = records.source()
  table = np.zeros((count, 2), np.int64)
  for start in range(0, count, _CHUNK):
    if start % _REPORTED < _CHUNK and count > _REPORTED:
      logging.info(
        '%s: reading the labels of %s of %s records, once',
        path, f'{start:,}', f'{count:,}',
      )  # fmt: skip
    indices = range(start, min(start + _CHUNK, count))
    try:
      for index, row in zip(indices, source.__getitems__(indices), strict=True):
        label = int(row[records.label]) if records.label else 0
        table[index] = len(row[records.image]), label
    except Exception as error:  # noqa: BLE001 - of any kind, from C++.
      raise _unreadable(path, records, start, error) from error
  return table
