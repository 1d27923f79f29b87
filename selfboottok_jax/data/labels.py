"""Reads label files, which give classes to pictures that lie in one folder.

ImageNet's validation pictures come so. Its labels are published in several
forms, all of which are read.
"""

import collections
import csv
import io
import os
import pathlib
import re
import tarfile
from collections.abc import Mapping, Sequence, Set

import numpy as np

from selfboottok_jax import errors
from selfboottok_jax.data import layout, pictures, roles, synsets

_TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
_META = 'meta.mat'


def label_pictures(
  listing: layout.Listing, paths: Sequence[str]
) -> layout.Listing:
  """Moves the pictures of a flat folder into class folders, by label files.

  Args:
    listing: of the folder.
    paths: a label file and, where its labels are numbers of the devkit, the
      file that maps them to synsets. The forms are: a class or synset for each
      picture, a line each, in the order of the pictures' names; lines or CSV
      rows of a picture's name and its class, as Kaggle's LOC_val_solution.csv;
      numbers from 0 in the order of the synsets' names; the devkit's numbers
      from 1, with its meta.mat or map_clsloc.txt; or the devkit as it comes
      (ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to).

  Raises:
    DataError: a file of another form, or one that does not fit the pictures.
  """
  flat, split = _flat_folder(listing)
  names = sorted(
    name
    for name in listing.files
    if name.rpartition('/')[0] == flat and _is_picture(name)
  )
  folders = {
    part
    for name in set(listing.files) - set(names)
    if _is_picture(name)
    for part in name.split('/')[:-1]
  }
  class_of = _read(paths, names, folders)
  moved = layout.Listing(
    folders=set(listing.folders) - {flat},
    bad=list(listing.bad),
    notes=list(listing.notes),
  )
  for name, file in listing.files.items():
    parts = (split, class_of.get(name, ''), name.rpartition('/')[2])
    new = '/'.join(filter(None, parts)) if name in class_of else name
    moved.files[new] = file
  return moved


def _flat_folder(listing: layout.Listing) -> tuple[str, str]:
  """The folder whose pictures need labels, and where class folders belong.

  It is that of val, as `val`, or `val/images` of Tiny ImageNet, whose classes
  belong into `val`; or the only folder with pictures.

  Raises:
    DataError: there is no such folder, or there are several.
  """
  counts = collections.Counter(
    name.rpartition('/')[0] for name in listing.files if _is_picture(name)
  )
  found = []
  for folder in counts:
    parts = folder.split('/')
    at = [i for i, part in enumerate(parts) if roles.folder_role(part) == 'val']
    if at:
      found.append((folder, '/'.join(parts[: at[0] + 1])))
  if len(found) == 1:
    return found[0]
  if len(counts) == 1:
    return next(iter(counts)), next(iter(counts))
  raise errors.DataError(
    'labels were given, but no val folder has images of its own, outside class '
    'folders; leave the labels out, or give the path of such images'
  )


def _is_picture(name: str) -> bool:
  # Not only those that can be read here: a label file counts them all.
  return layout.suffix(name) in pictures.PICTURES


def _read(
  paths: Sequence[str], names: Sequence[str], folders: Set[str]
) -> dict[str, str]:
  """The class of each picture, by its name in the listing.

  `folders` are the names of other folders with pictures: classes among them.
  """
  main, numbers = _texts(paths)
  shown = ', '.join(paths)
  rows = _rows(main, shown)
  given: dict[str, str] = {}
  by_base = {_base(name): name for name in names}
  if all(len(row) == 1 for row in rows):
    if len(rows) != len(names):
      raise errors.DataError(
        f'{shown} has {len(rows):,} labels for {len(names):,} images without '
        'class folders; wanted one for each, in the order of their names'
      )
    given = dict(zip(names, (row[0] for row in rows), strict=True))
  else:
    for row in rows:
      name = by_base.get(_base(row[0]))
      if name is not None and len(row) > 1:
        given[name] = row[1]
    if missing := [name for name in names if name not in given]:
      raise errors.DataError(
        f'{shown} has no label for {len(missing):,} of {len(names):,} images, '
        f'such as {missing[0]}; wanted rows of a name and a class'
      )
  return _to_classes(given, numbers, folders, shown)


def _to_classes(
  given: Mapping[str, str],
  numbers: Mapping[int, str],
  folders: Set[str],
  shown: str,
) -> dict[str, str]:
  """Turns numbers into synsets, unless they are names of class folders."""
  if set(given.values()) <= folders or not all(
    re.fullmatch(r'\d+', label) for label in given.values()
  ):
    return dict(given)
  of_imagenet = not folders or any(map(synsets.is_synset, folders))
  if not numbers and not of_imagenet:
    raise errors.DataError(
      f'{shown} has numbers, such as {next(iter(given.values()))}, and no '
      'class folders have these names; wanted the names of classes'
    )
  found = {name: int(label) for name, label in given.items()}
  if not numbers:
    if min(found.values()) > 0:
      raise errors.DataError(
        f'{shown} has numbers from 1, which only the devkit can map to '
        f'classes; give its {_META} or map_clsloc.txt too, as --labels='
        f'{shown},{_META}'
      )
    numbers = dict(enumerate(synsets.words()))
  if unknown := sorted(set(found.values()) - set(numbers)):
    raise errors.DataError(
      f'{shown} has the label {unknown[0]}, which maps to no class; wanted one '
      f'of {len(numbers):,} numbers from {min(numbers)} to {max(numbers)}'
    )
  return {name: numbers[label] for name, label in found.items()}


def _base(name: str) -> str:
  """A picture's name without folder and ending."""
  base = name.replace('\\', '/').rpartition('/')[2]
  # A name may have dots that begin no ending, and CSVs leave endings out.
  return base[: -len(layout.suffix(base))] if _is_picture(base) else base


def _texts(paths: Sequence[str]) -> tuple[str, dict[int, str]]:
  """The text of the labels, and synsets by number, out of the files given."""
  text, numbers = None, {}
  for path in paths:
    for name, data in _open(path).items():
      if name.endswith('.mat'):
        numbers = _read_meta(data, path)
      else:
        decoded = data.decode('utf-8-sig', 'replace')
        if mapping := _read_map(decoded):
          numbers = mapping
        elif text is None:
          text = decoded
        else:
          raise errors.DataError(
            f'{", ".join(paths)} are two files of labels; give one'
          )
  if text is None:
    raise errors.DataError(
      f'{", ".join(paths)} has no labels; wanted a text or CSV file of labels'
    )
  return text, numbers


def _open(path: str) -> dict[str, bytes]:
  """The label files that a path means, by name."""
  path = os.path.expanduser(path)
  try:
    if os.path.isdir(path):
      return {
        file.name: file.read_bytes()
        for file in sorted(pathlib.Path(path).rglob('*'))
        if file.name in (_TRUTH, _META)
      }
    if tarfile.is_tarfile(path):
      with tarfile.open(path) as tar:
        return {
          pathlib.PurePosixPath(member.name).name: content.read()
          for member in tar
          if pathlib.PurePosixPath(member.name).name in (_TRUTH, _META)
          and (content := tar.extractfile(member)) is not None
        }
    found = {os.path.basename(path): pathlib.Path(path).read_bytes()}
    beside = pathlib.Path(path).parent / _META
    if os.path.basename(path) == _TRUTH and beside.is_file():
      found[_META] = beside.read_bytes()
    return found
  except (OSError, tarfile.TarError) as error:
    raise errors.DataError(
      f'cannot read the labels of {path}: {error}; check the path'
    ) from error


def _read_meta(data: bytes, path: str) -> dict[int, str]:
  """Synsets by their number, of the devkit's meta.mat."""
  from scipy import io as scipy_io
  from scipy.io import matlab

  try:
    table = scipy_io.loadmat(io.BytesIO(data), squeeze_me=True)['synsets']
    rows = np.atleast_1d(table)
    return {int(row['ILSVRC2012_ID']): str(row['WNID']) for row in rows}
  except (
    *(ValueError, KeyError, TypeError, OSError, IndexError),
    matlab.MatReadError,
  ) as error:
    raise errors.DataError(
      f'{path} is no meta.mat of ILSVRC 2012 ({error}); give the one of its '
      'devkit'
    ) from error


def _read_map(text: str) -> dict[int, str]:
  """Synsets by number, of lines as 'n02119789 1 kit_fox'; else {}."""
  found = {}
  for line in filter(None, map(str.strip, text.splitlines())):
    match = re.match(r'(n\d{8})[\s,]+(\d+)\b', line)
    if not match:
      return {}
    found[int(match[2])] = match[1]
  return found


def _rows(text: str, shown: str) -> list[list[str]]:
  """Labels, or pairs of a picture's name and its label."""
  lines = [line for line in text.splitlines() if line.strip()]
  if not lines:
    raise errors.DataError(f'{shown} is empty; wanted a file of labels')
  tabbed = all('\t' in line for line in lines)
  if tabbed or any(',' in line for line in lines):
    read = csv.reader(lines, delimiter='\t' if tabbed else ',')
    rows = [[cell.strip() for cell in row] for row in read]
    # A header names its columns, none of which is a picture's name and class.
    if rows[0][0].lower() in _HEADERS:
      rows = rows[1:]
  else:
    rows = [line.split(None, 1) for line in lines]
  # Kaggle writes the boxes after the class, with spaces between.
  return [[row[0], *map(_without_boxes, row[1:2])] for row in rows]


def _without_boxes(cell: str) -> str:
  match = re.fullmatch(r'(n\d{8})(\s+\S+)*\s*', cell)
  return match[1] if match else cell.strip()


_HEADERS = frozenset({
  'file', 'file_name', 'filename', 'id', 'image', 'image_id', 'imageid', 'img',
  'name', 'path',
})  # fmt: skip
