"""Tells which split the parts of a data set belong to, by their names.

Parts are what a set is delivered in: tars, Parquet files, the splits of TFDS.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from selfboottok_jax import errors
from selfboottok_jax.data import picture_set

VAL_FRACTION = 0.1

_ROLES = {
  'train': ('train', 'training'),
  'val': ('val', 'valid', 'validation', 'eval', 'evaluation', 'dev'),
  'test': ('test', 'testing'),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}
# A folder's whole name, in any case, perhaps with a year, as COCO's train2017.
_FOLDER = re.compile(rf'({"|".join(_ROLE_OF)})[-_]?(\d{{4}})?', re.IGNORECASE)
_NUMBERED = re.compile(r'(.*?)(\d+)-of-(\d+)(.*)')
_COUNTED = re.compile(r'(.*?)(\d+)(\.[a-z]+)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The parts that make up each split.

  Attributes:
    parts: names of the parts of 'train' and 'val', in the order given. Empty
      where there are none.
    is_held_out: whether one picture in ten of 'train' is for validation.
    origin: see `picture_set.PictureSet`.
  """

  parts: Mapping[str, tuple[str, ...]]
  is_held_out: bool
  origin: str

  def find_val(
    self,
    parts: Sequence[str],
    part_of: Int[np.ndarray, 'n'],
    names: Callable[[], Sequence[str]],
  ) -> Bool[np.ndarray, 'n']:
    """Returns which pictures are for validation.

    Args:
      parts: names of parts.
      part_of: the part of each picture, an index into `parts`.
      names: returns the pictures' names, where their hashes decide.
    """
    if self.is_held_out:
      return held_out(names())
    in_val = set(self.parts['val'])
    return np.array([part in in_val for part in parts], np.bool_)[part_of]


def role(name: str) -> str:
  """Returns the split that a name tells: 'train', 'val', 'test' or ''.

  It is the first word that does, as in 'imagenet-val-00000-of-00064'.
  """
  return next(_roles_in(name), '')


def folder_role(name: str) -> str:
  """Returns the split that a folder's name is: 'train', 'val', 'test' or ''."""
  match = _FOLDER.fullmatch(name)
  return _ROLE_OF[match[1].lower()] if match else ''


def word_role(name: str) -> str:
  """Returns the split that the words of a name tell, '' for none or several.

  As in 'train_images' and 'ILSVRC2012_img_val'.
  """
  found = set(_roles_in(name))
  return found.pop() if len(found) == 1 else ''


def _roles_in(name: str) -> Iterator[str]:
  """The splits that the words of a name tell, in their order."""
  for word in re.split(r'[^a-z]+', name.lower()):
    if word in _ROLE_OF:
      yield _ROLE_OF[word]


def in_validation(name: str) -> bool:
  """The split of a set that has none: about 10 % of all names."""
  digest = hashlib.sha256(name.encode(*picture_set.UTF8)).digest()
  return int.from_bytes(digest[:8], 'big') < VAL_FRACTION * 2**64


def plan(role_of: Mapping[str, str], path: str, kind: str) -> Plan:
  """Chooses the parts of both splits.

  Args:
    role_of: the role of each part, by its name; see `role`.
    path: of the set, for errors.
    kind: what the parts are, as 'shards'.

  Raises:
    DataError: some parts tell their split, and others do not.
  """
  found: dict[str, tuple[str, ...]] = {}
  for each in role_of.values():
    found[each] = tuple(name for name, own in role_of.items() if own == each)
  unknown = found.pop('', ())
  if unknown and found:
    first = next(iter(found.values()))[0]
    raise errors.DataError(
      f'{path}: the name {unknown[0]} tells no split, as {first} does; wanted '
      f'train, val or test in the names of all {kind} or of none: rename it, '
      'or give a path without it'
    )
  if unknown:
    return Plan(
      {'train': unknown, 'val': ()},
      True,
      f'no {kind} are named train or val, so one image in ten is held out for '
      'val, by a hash of its name',
    )
  train, val = found.get('train', ()), found.get('val') or found.get('test', ())
  shown = [
    f'{split} is {_count(parts, kind)}'
    for split, parts in (('train', train), ('val', val))
    if parts
  ]
  origin = ', '.join(shown)
  if not val:
    origin += (
      f' and no {kind} are named val, so one image in ten is held out for it, '
      'by a hash of its name'
    )
  if 'val' in found and 'test' in found:
    origin += f'; {_count(found["test"], kind)} of test are left out'
  elif 'test' in found and len(val) > 1:
    origin += ' of test'
  return Plan({'train': train, 'val': val}, not val, origin)


def _count(parts: Sequence[str], kind: str) -> str:
  """The number of some parts, or the name of a single one."""
  return parts[0] if len(parts) == 1 else f'{len(parts):,} {kind}'


def held_out(names: Sequence[str]) -> Bool[np.ndarray, '_']:
  """Returns which pictures a hash of their names holds out, one in ten."""
  return np.fromiter(
    (in_validation(name) for name in names), np.bool_, len(names)
  )


def check_numbers(names: Sequence[str], path: str, kind: str) -> None:
  """Checks that all files are there of those that say how many they are.

  Args:
    names: of files, as 'train-00000-of-00002.parquet'.
    path: of the set, for errors.
    kind: what the files are, as 'shards'.

  Raises:
    DataError: some are missing; names the first.
  """
  groups: dict[tuple[str, str, str], dict[int, int]] = {}
  for name in names:
    if match := _NUMBERED.fullmatch(name):
      before, number, count, after = match.groups()
      groups.setdefault((before, count, after), {})[int(number)] = len(number)
  for (before, count, after), there in groups.items():
    missing = [i for i in range(int(count)) if i not in there]
    if missing:
      width = max(there.values())
      raise errors.DataError(
        f'{path} lacks {before}{missing[0]:0{width}}-of-{count}{after} '
        f'({len(missing):,} of {int(count):,} {kind} are missing); copy or '
        'download what is missing'
      )


def gaps(names: Sequence[str], kind: str) -> tuple[str, ...]:
  """Notes files that are missing among those that are counted, as in 000.tar.

  Files do not say how many they are, so that no missing last one is seen.

  Args:
    names: of files.
    kind: what the files are, as 'shards'.
  """
  groups: dict[tuple[str, str], dict[int, int]] = {}
  for name in names:
    match = _COUNTED.fullmatch(name)
    if match and not _NUMBERED.fullmatch(name):
      before, number, after = match.groups()
      groups.setdefault((before, after), {})[int(number)] = len(number)
  notes = []
  for (before, after), digits in groups.items():
    first, last = min(digits), max(digits)
    # Dates and the like count nothing.
    if 1 + last - first > 2 * len(digits):
      continue
    missing = [n for n in range(first, last) if n not in digits]
    if missing:
      # The first number has the leading zeros that there are.
      notes.append(
        f'{before}{missing[0]:0{digits[first]}}{after} is not there, of {kind} '
        f'that are counted ({len(missing):,} of them are missing)'
      )
  return tuple(notes)
