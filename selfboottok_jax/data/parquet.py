"""Photographs in Parquet files, as the Hugging Face hub lays them out.

Files hold a column of pictures, as a struct of `bytes` and `path` or as binary,
and perhaps one of labels. They are read a group of rows at a time, which is too
much for one picture: small sets are kept in memory, large ones go through
`launch.prepare`.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from selfboottok_jax import errors
from selfboottok_jax.data import classes, packed_names, picture_set, roles

# Bytes of encoded pictures that a process keeps in memory.
MOST_BYTES = 2**30
_IMAGES = ('image', 'img', 'picture', 'photo', 'jpg', 'png')
_LABELS = ('label', 'labels', 'fine_label', 'class', 'cls')
# Folders below which files are looked for: CONFIG/SPLIT, or data.
_DEPTH = 3
# A folder of more is one of classes, not of splits or configurations.
_MOST_FOLDERS = 64


def matches(path: str) -> bool:
  """Returns True for a Parquet file, or a folder that has some.

  They may lie in its `data/`, or in folders of splits or configurations.
  """
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    return bool(_list_files(path, first=True))
  return path.endswith('.parquet') and os.path.exists(path)


def open_parquet(
  path: str, *, any_size: bool = False
) -> picture_set.PictureSet:
  """Lists the pictures of Parquet files, by their footers and labels.

  Files or folders that are named train, validation or test make up the splits.
  Names are FILE/ROW. Up to `MOST_BYTES` of pictures are read here, and once in
  every process that a split is sent to; then sizes are known, and the
  fingerprint is that of names, sizes and labels. Of larger sets it is that of
  files' names, sizes and footers, which hold the row counts and statistics.

  Args:
    path: a file or a folder.
    any_size: reads larger sets too, a group of rows at a time, which is fast
      where pictures are read in order. Their sizes are 0, as only the pictures
      tell them.

  Raises:
    DataError: no pictures, several configurations, columns of another kind, or
      a set that is too large to be read in any order.
  """
  expanded = os.path.expanduser(path)
  is_folder = os.path.isdir(expanded)
  root = expanded if is_folder else os.path.dirname(expanded)
  files = _list_files(expanded) if is_folder else [os.path.basename(expanded)]
  if not files or not os.path.exists(expanded):
    raise errors.DataError(
      f'{path} holds no Parquet files; give a .parquet file, or the folder of '
      'a data set of the Hugging Face hub'
    )
  roles.check_numbers(files, path, 'files')
  plan = roles.plan(_roles(files, path), path, 'files')
  used = [f for split in picture_set.SPLITS for f in plan.parts[split]]
  parts = {name: _read_footer(root, name) for name in used}
  columns = _find_columns(parts, path)
  total = sum(part.image_bytes(columns.image) for part in parts.values())
  in_memory = total <= MOST_BYTES
  if not in_memory and not any_size:
    raise errors.DataError(
      f'{path} has {total / 2**30:.1f} GiB of images in Parquet, which cannot '
      f'be read in any order; run `python -m launch.prepare --path={path} '
      '--out=NEW` first, and give NEW'
    )
  return _make_set(path, plan, parts, columns, in_memory)


@dataclasses.dataclass(frozen=True)
class _Part:
  """A Parquet file.

  Attributes:
    file: its path.
    name: relative to the set.
    metadata: of pyarrow: groups of rows and their columns.
    schema: of arrow.
    print: sha256 (hex) of its footer and its size.
  """

  file: str
  name: str
  metadata: Any
  schema: Any
  print: str

  @property
  def rows(self) -> int:
    """Number of pictures."""
    return self.metadata.num_rows

  def image_bytes(self, column: str) -> int:
    """Bytes of a column and what is below it, not compressed."""
    total = 0
    for group in range(self.metadata.num_row_groups):
      row_group = self.metadata.row_group(group)
      for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        if chunk.path_in_schema.split('.')[0] == column:
          total += chunk.total_uncompressed_size
    return total


@dataclasses.dataclass(frozen=True)
class _Columns:
  """The columns that are read of each row.

  Attributes:
    image: column of the pictures.
    field: its field with the bytes; '' if the column is binary itself.
    label: column of the classes; '' without.
    names: of the classes, where the schema has them.
    notes: see `picture_set.PictureSet`.
  """

  image: str
  field: str
  label: str
  names: tuple[str, ...]
  notes: tuple[str, ...]


def _import() -> tuple[Any, Any]:
  """Returns pyarrow and its part for Parquet."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise errors.DataError(
      'Parquet files are read with pyarrow, which is missing; pip install '
      "'selfboottok_jax[parquet]'"
    ) from error
  return pyarrow, parquet


def _list_files(folder: str, *, first: bool = False) -> list[str]:
  """Parquet files of a set, relative to its folder, sorted.

  Args:
    folder: of the set.
    first: whether one is enough.
  """
  found: list[str] = []
  level = ['']
  for _ in range(_DEPTH):
    below: list[str] = []
    for relative in level:
      for entry in list(os.scandir(os.path.join(folder, relative))):
        name = f'{relative}{entry.name}'
        if entry.name.startswith('.'):
          continue
        if entry.name.endswith('.parquet'):
          found.append(name)
          if first:
            return found
        elif entry.is_dir():
          below.append(f'{name}/')
    level = below if len(below) <= _MOST_FOLDERS else []
  return sorted(found)


def _roles(files: Sequence[str], path: str) -> dict[str, str]:
  """The split of each file, by its name or its folder.

  Raises:
    DataError: the files are of several configurations.
  """
  found, configurations = {}, set()
  for name in files:
    *folders, base = name.split('/')
    # 'train-00000-of-00002.parquet', or 'train/0000.parquet'.
    found[name] = roles.role(base)
    if folders and not found[name]:
      found[name] = roles.role(folders.pop())
    elif folders and roles.role(folders[-1]) == found[name]:
      folders.pop()
    configurations.add('/'.join(f for f in folders if f != 'data'))
  if len(configurations) > 1:
    shown = sorted(configurations)
    raise errors.DataError(
      f'{path} has {len(shown)} configurations ({", ".join(shown[:8])}); give '
      f'the path of one, as {path.rstrip("/")}/{shown[-1]}'
    )
  return found


def _read_footer(root: str, name: str) -> _Part:
  """Reads the description of a file; DataError if it is damaged."""
  pyarrow, parquet = _import()
  file = os.path.join(root, name)
  try:
    with parquet.ParquetFile(file) as opened:
      metadata, schema = opened.metadata, opened.schema_arrow
    with open(file, 'rb') as raw:
      size = raw.seek(0, os.SEEK_END)
      raw.seek(max(size - metadata.serialized_size - 8, 0))
      footer = hashlib.sha256(raw.read())
  except (pyarrow.ArrowException, OSError) as error:
    raise errors.DataError(_damaged(file, error)) from error
  footer.update(str(size).encode())
  return _Part(file, name, metadata, schema, footer.hexdigest())


def _damaged(file: str, error: BaseException) -> str:
  reason = ' '.join(str(error).split())
  return (
    f'{file} is no Parquet file, or is damaged ({reason[:200]}); copy or '
    'download it again'
  )


def _find_columns(parts: Mapping[str, _Part], path: str) -> _Columns:
  """Chooses the columns; DataError where that is not possible."""
  schemas = [part.schema for part in parts.values()]
  for part in parts.values():
    if not part.schema.equals(schemas[0]):
      raise errors.DataError(
        f'{path}: {part.name} has the columns {_listed(part.schema)}, and '
        f'{next(iter(parts))} has {_listed(schemas[0])}; wanted the same in '
        'all: give a path without one of them'
      )
  schema, features = schemas[0], _features(schemas[0])
  image = _image_column(schema, features, path)
  label, notes = _label_column(schema, features, path)
  names: tuple[str, ...] = ()
  if label:
    given = {tuple(_class_names(_features(s), label)) for s in schemas}
    if len(given) > 1:
      raise errors.DataError(
        f'{path}: its files name the classes of {label} differently; wanted '
        'the same in all'
      )
    names = given.pop()
  is_struct = _is_struct(schema.field(image).type)
  return _Columns(image, 'bytes' if is_struct else '', label, names, notes)


def _features(schema: Any) -> dict[str, Any]:
  """Descriptions of columns by the Hugging Face hub, by name."""
  try:
    found = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
    features = found.get('info', {}).get('features', {})
  except (ValueError, AttributeError):
    return {}
  return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], column: str) -> str:
  """The hub's type of a column, as 'ClassLabel'; '' if unknown."""
  feature = features.get(column)
  return str(feature.get('_type', '')) if isinstance(feature, dict) else ''


def _class_names(features: Mapping[str, Any], column: str) -> list[str]:
  feature = features.get(column)
  names = feature.get('names') if isinstance(feature, dict) else None
  # Older files have {'0': 'cat', ...}.
  if isinstance(names, dict):
    names = [names[key] for key in sorted(names, key=int)]
  return [str(name) for name in names or ()]


def _listed(schema: Any) -> str:
  """Names and types of columns, cut short."""
  return ', '.join(f'{f.name} ({f.type})' for f in schema)[:300]


def _is_struct(kind: Any) -> bool:
  pyarrow, _ = _import()
  return pyarrow.types.is_struct(kind)


def _holds_bytes(kind: Any) -> bool:
  """True for a type that pictures are stored in."""
  pyarrow, _ = _import()
  if pyarrow.types.is_struct(kind):
    index = kind.get_field_index('bytes')
    return index >= 0 and _holds_bytes(kind.field(index).type)
  return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _image_column(schema: Any, features: Mapping[str, Any], path: str) -> str:
  able = [n for n in schema.names if _holds_bytes(schema.field(n).type)]
  declared = [name for name in able if _kind(features, name) == 'Image']
  for found in (declared, able):
    if len(found) == 1:
      return found[0]
    for name in _IMAGES:
      if name in found:
        return name
  several = f'{len(able)} columns of images' if able else 'no column of images'
  raise errors.DataError(
    f'{path} has {several}, among {_listed(schema)}; wanted one named '
    'image, of binary or a struct with bytes'
  )


def _label_column(
  schema: Any, features: Mapping[str, Any], path: str
) -> tuple[str, tuple[str, ...]]:
  """The column of labels, '' without one; and notes."""
  declared = [n for n in schema.names if _kind(features, n) == 'ClassLabel']
  label = next((n for n in _LABELS if n in (declared or schema.names)), '')
  if not label and len(declared) == 1:
    label = declared[0]
  others = [name for name in declared if name != label]
  if not label:
    shown = ', '.join(schema.names)
    what = f'of {", ".join(others)} none' if others else f'none of {shown}'
    return '', (f'no classes: {what} is named label',)
  pyarrow, _ = _import()
  kind, types = schema.field(label).type, pyarrow.types
  if types.is_dictionary(kind):
    kind = kind.value_type
  if not any(
    check(kind)
    for check in (types.is_integer, types.is_string, types.is_large_string,
                  types.is_boolean)
  ):  # fmt: skip
    raise errors.DataError(
      f'{path}: the column {label} is of {kind}; wanted one class for each '
      'image, a whole number or a text: rename the column to train without '
      'classes'
    )
  if others:
    return label, (f'classes are those of {label}, not of {", ".join(others)}',)
  return label, ()


def _make_set(
  path: str,
  plan: roles.Plan,
  parts: Mapping[str, _Part],
  columns: _Columns,
  in_memory: bool,
) -> picture_set.PictureSet:
  """Reads labels, and pictures if there are few."""
  ordered = list(parts.values())
  rows = np.array([part.rows for part in ordered], np.int64)
  count = int(rows.sum())
  if not count:
    raise errors.DataError(f'{path} has Parquet files without rows; check it')
  part_of = np.repeat(np.arange(len(ordered)), rows)
  row_of = np.arange(count) - np.repeat(np.cumsum(rows) - rows, rows)

  def name(index: int) -> str:
    return f'{ordered[part_of[index]].name}/{row_of[index]}'

  labelled = _read_labels(
    ordered, columns, count, lambda i: f'{path}/{name(i)}'
  )
  names = packed_names.PackedNames(name(i) for i in range(count))
  is_val = plan.find_val(
    [part.name for part in ordered], part_of, lambda: names
  )
  files = [part.file for part in ordered]
  memory = _Memory(files, columns) if in_memory else None
  sizes = np.zeros(count, np.int64) if memory is None else memory.sizes()
  is_empty = (sizes == 0) & in_memory
  splits = {}
  for split in picture_set.SPLITS:
    indices = np.flatnonzero((is_val == (split == 'val')) & ~is_empty)
    its_names, its_labels = names.take(indices), labelled.labels[indices]
    known = ''
    if memory is not None:
      reader: picture_set.Reader = picture_set.Selected(memory, indices)
      digest = picture_set.digest(
        labelled.names, its_names, sizes[indices], its_labels
      )
    else:
      groups = _Groups(files, [part.metadata for part in ordered], columns)
      reader = picture_set.Selected(groups, indices)
      digest = known = _manifest(ordered, labelled.names, indices)
    splits[split] = picture_set.Split(
      its_names, sizes[indices], its_labels, reader, digest, known
    )
  return picture_set.PictureSet(
    path,
    splits,
    labelled.names,
    plan.origin,
    (
      *columns.notes,
      *labelled.notes,
      *roles.gaps([part.name for part in ordered], 'files'),
    ),
    bad=tuple(
      picture_set.Bad(name(int(index)), 'the file is empty')
      for index in np.flatnonzero(is_empty)
    ),
  )


def _manifest(
  parts: Sequence[_Part],
  class_names: Sequence[str],
  indices: Int[np.ndarray, '_'],
) -> str:
  """Sha256 (hex) of files' names, sizes and footers, and of what is chosen."""
  total = hashlib.sha256('\0'.join(class_names).encode())
  for part in parts:
    total.update(f'\n{part.name}\0{part.rows}\0{part.print}'.encode())
  total.update(indices.astype('<i8').tobytes())
  return total.hexdigest()


def _read_labels(
  parts: Sequence[_Part],
  columns: _Columns,
  count: int,
  name: Callable[[int], str],
) -> classes.Classes:
  """Labels of all pictures; DataError if one has none."""
  if not columns.label:
    return classes.none(count)
  pyarrow, _ = _import()
  tables = [_read_table(part.file, [columns.label]) for part in parts]
  column = pyarrow.concat_tables(tables).column(0)
  if pyarrow.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if column.null_count:
    first = int(np.flatnonzero(column.is_null().to_numpy())[0])
    raise errors.DataError(
      f'{name(first)} has no {columns.label}, as have {column.null_count:,} of '
      f'{count:,} images; wanted a class for all of them'
    )
  if pyarrow.types.is_boolean(column.type):
    column = column.cast(pyarrow.int8())
  if pyarrow.types.is_integer(column.type):
    values = column.to_numpy().astype(np.int64)
    return classes.from_numbers(values, columns.names, name)
  coded = column.combine_chunks().dictionary_encode()
  if hasattr(coded, 'combine_chunks'):
    coded = coded.combine_chunks()
  texts = coded.dictionary.to_pylist()
  return classes.from_texts(coded.indices.to_numpy(), texts, name)


def _read_table(file: str, columns: Sequence[str]) -> Any:
  """Some columns of a file; DataError if it is damaged."""
  pyarrow, parquet = _import()
  try:
    with parquet.ParquetFile(file) as opened:
      return opened.read(columns=list(columns))
  except (pyarrow.ArrowException, OSError) as error:
    raise errors.DataError(_damaged(file, error)) from error


def _leaf(columns: _Columns) -> str:
  """The stored column of the pictures' bytes."""
  return f'{columns.image}.{columns.field}' if columns.field else columns.image


def _arrays(table: Any, columns: _Columns, file: str) -> list[Any]:
  """Arrays of pictures' bytes, null for a row without any.

  Raises:
    DataError: no row has any.
  """
  from pyarrow import compute

  column = table.column(columns.image)
  arrays = [
    # Unlike `chunk.field`, null too where the whole struct is.
    compute.struct_field(chunk, columns.field) if columns.field else chunk
    for chunk in column.chunks
  ]
  if len(column) and sum(a.null_count for a in arrays) == len(column):
    raise errors.DataError(
      f'{file} has rows without {_leaf(columns)}, perhaps with a path instead; '
      'wanted the bytes of every image: write the files anew with '
      'embed_external_files=True'
    )
  return arrays


# Arrays of pictures, and the index that follows each.
_Arrays = tuple[list[Any], Int[np.ndarray, '_']]


class _Memory:
  """All pictures of some files in memory, read when they are first wanted.

  A pickled copy reads them again: they stay in arrow's buffers, and no process
  has more than one copy.
  """

  def __init__(self, files: Sequence[str], columns: _Columns):
    self._files, self._columns = tuple(files), columns
    self._start()

  def _start(self) -> None:
    self._lock = threading.Lock()
    self._loaded: _Arrays | None = None

  def _load(self) -> _Arrays:
    with self._lock:
      if self._loaded is None:
        arrays = []
        for file in self._files:
          table = _read_table(file, [_leaf(self._columns)])
          arrays += _arrays(table, self._columns, file)
        self._loaded = arrays, np.cumsum([len(array) for array in arrays])
      return self._loaded

  def sizes(self) -> Int[np.ndarray, '_']:
    """Bytes of each picture."""
    pyarrow, _ = _import()
    from pyarrow import compute

    arrays, _ = self._load()
    lengths = [
      compute.binary_length(array).fill_null(0).to_numpy() for array in arrays
    ]
    return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)

  def __call__(self, index: int) -> bytes:
    arrays, ends = self._loaded or self._load()
    chunk = int(np.searchsorted(ends, index, side='right'))
    array = arrays[chunk]
    return array[int(index - ends[chunk] + len(array))].as_py() or b''

  def __getstate__(self) -> dict[str, Any]:
    return {'_files': self._files, '_columns': self._columns}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._start()


class _Groups:
  """Pictures of some files, a group of rows at a time.

  The last group of each thread is kept, so that pictures which are read in
  order are read once.
  """

  def __init__(
    self, files: Sequence[str], metadata: Sequence[Any], columns: _Columns
  ):
    """Lists the groups of `files`, whose `metadata` are pyarrow's."""
    self._files, self._columns = tuple(files), columns
    groups = [
      (file, group, footer.row_group(group).num_rows)
      for file, footer in enumerate(metadata)
      for group in range(footer.num_row_groups)
    ]
    self._groups = np.array(groups, np.int64).reshape(-1, 3)
    self._ends = np.cumsum(self._groups[:, 2])
    self._local = threading.local()

  def __call__(self, index: int) -> bytes:
    number = int(np.searchsorted(self._ends, index, side='right'))
    if getattr(self._local, 'number', None) != number:
      # Before the next is read, or there would be two in memory.
      self._local.memory = self._local.number = None
      self._local.arrays = self._read(number)
      self._local.number = number
    at = int(index - self._ends[number] + self._groups[number, 2])
    for array in self._local.arrays:
      if at < len(array):
        return array[at].as_py() or b''
      at -= len(array)
    raise AssertionError('a group has fewer rows than its footer says')

  def _read(self, number: int) -> list[Any]:
    pyarrow, parquet = _import()
    file_index, group, _ = self._groups[number].tolist()
    file = self._files[file_index]
    try:
      with parquet.ParquetFile(file) as opened:
        table = opened.read_row_group(group, columns=[_leaf(self._columns)])
    except (pyarrow.ArrowException, OSError) as error:
      raise errors.DataError(_damaged(file, error)) from error
    return _arrays(table, self._columns, file)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in vars(self).items() if k != '_local'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._local = threading.local()
