"""Photographs in WebDataset shards: tars of `KEY.jpg` beside `KEY.cls`.

A key is a member's path up to the first dot of its base name. Pictures come in
the order of the shards, and of the keys in each. Their classes are in the files
beside them, see `shard_labels`.
"""

import array
import collections
import functools
import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from selfboottok_jax import errors
from selfboottok_jax.data import (
  classes,
  layout,
  packed_names,
  picture_set,
  pictures,
  roles,
  shard_labels,
  tars,
)

# A key may have several pictures: the first of these that it has is taken, or
# else any.
_PREFERRED = ('jpg', 'jpeg', 'png', 'webp')
# Members of a tar that are read to see what it is.
_PEEKED = 64
_NUMBERED = re.compile(r'(.*[-_.])?[0-9]{3,}(-of-[0-9]+)?\.tar')
_BRACES = re.compile(r'\{([^{}]*)\}')
_RANGE = re.compile(r'(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?')
_PACKED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')


def matches(path: str) -> bool:
  """Returns True for a path of WebDataset shards.

  It is one with braces or `*` that names tars; a list of tars with commas
  between, of which the first is a shard; a folder of tars that are shards or
  numbered as such; or a tar that is one. A tar is a shard if one of its first
  pictures has a `.cls` beside it, or a `.json` or `.txt` and no folder: those
  are also found in trees of class folders.
  """
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    found = _list_folder(path)
    numbered = all(_NUMBERED.fullmatch(os.path.basename(f)) for f in found)
    return bool(found) and (numbered or _peek(found[0]) == 'shard')
  if os.path.exists(path):
    return path.endswith('.tar') and _peek(path) == 'shard'
  parts = [part for part in _split_list(path) if part]
  if not parts or not all(part.endswith(('.tar', *_PACKED)) for part in parts):
    return False
  there = [file for file in _expand(path) if os.path.isfile(file)]
  kind = _peek(there[0]) if there else ''
  if '{' in path or '*' in path:
    return kind != 'nested'
  return kind == 'shard'


def open_shards(path: str) -> picture_set.PictureSet:
  """Lists the pictures of WebDataset shards, by their headers and labels.

  Shards with train, val or test in their names make up the splits. The
  fingerprint is that of keys, sizes and labels: shards that were cut otherwise
  have the same.

  Args:
    path: see `matches`. `{000000..000099}` is a range with its leading zeros,
      `{0..99..2}` every second, `{a,b}` a list.

  Raises:
    DataError: shards that are missing, damaged or compressed; pictures without
      a label beside others that have one.
  """
  if '://' in path:
    raise errors.DataError(
      f'{path} is not on a disk of this machine, and shards are read in any '
      'order; copy them here, or run `python -m launch.prepare` on them where '
      'they are and give its output'
    )
  paths = _find(path)
  manifest = []
  for file in paths:
    stat = os.stat(file)
    manifest.append((file, stat.st_size, stat.st_mtime_ns))
  return _open(path, tuple(manifest))


def _find(path: str) -> list[str]:
  """The shards that a path means; DataError if any is not there."""
  expanded = os.path.expanduser(path)
  if os.path.isdir(expanded):
    paths = _list_folder(expanded)
    relative = [os.path.relpath(file, expanded) for file in paths]
    roles.check_numbers(relative, path, 'shards')
  elif os.path.isfile(expanded):
    paths = [expanded]
  else:
    paths = _expand(expanded)
  if not paths:
    raise errors.DataError(
      f'{path} names no shards; give the path of .tar files'
    )
  missing = [file for file in paths if not os.path.isfile(file)]
  if missing:
    raise errors.DataError(
      f'the shard {missing[0]} does not exist ({len(missing):,} of the '
      f'{len(paths):,} of {path} are missing); copy or download what is missing'
      ', or name only shards that are there'
    )
  if twice := [f for f, n in collections.Counter(paths).items() if n > 1]:
    raise errors.DataError(
      f'{path} names the shard {twice[0]} twice; name it once'
    )
  return paths


def _list_folder(folder: str) -> list[str]:
  """Tars of a folder and of its folders that are splits, sorted."""
  found = []
  for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
    if entry.name.startswith('.'):
      continue
    if entry.is_dir() and roles.role(entry.name):
      found += [
        os.path.join(entry.path, name)
        for name in sorted(os.listdir(entry.path))
        if name.endswith('.tar') and not name.startswith('.')
      ]
    elif entry.name.endswith('.tar') and entry.is_file():
      found.append(entry.path)
  return found


def _split_list(path: str) -> list[str]:
  """The parts of a path between commas that are not in braces."""
  return re.split(r',(?![^{}]*\})', path)


def _expand(path: str) -> list[str]:
  """The files that a path with commas, braces and `*` names, in its order."""
  found: list[str] = []
  for part in _split_list(path):
    for name in _expand_braces(os.path.expanduser(part)):
      found += sorted(glob.glob(name)) if '*' in name else [name]
  return found


def _expand_braces(text: str) -> Iterator[str]:
  """What a shell makes of braces."""
  match = _BRACES.search(text)
  if not match:
    yield text
    return
  before, after = text[: match.start()], text[match.end() :]
  bounds = _RANGE.fullmatch(match[1])
  choices = match[1].split(',')
  if bounds:
    first, last = int(bounds[1]), int(bounds[2])
    padded = any(re.match(r'-?0\d', bound) for bound in bounds.groups()[:2])
    width = max(len(bounds[1]), len(bounds[2])) if padded else 0
    step = max(int(bounds[3] or 1), 1)
    numbers = range(first, last + 1, step)
    if last < first:
      numbers = range(first, last - 1, -step)
    choices = [f'{number:0{width}}' for number in numbers]
  for choice in choices:
    for rest in _expand_braces(after):
      yield f'{before}{choice}{rest}'


def _peek(path: str) -> str:
  """What a tar is by its first members: 'shard', 'nested' or 'plain'."""
  known = pictures.suffixes()
  labelled: dict[str, set[str]] = {}
  try:
    with tarfile.open(path, 'r:') as tar:
      for member in itertools.islice(tar, _PEEKED):
        if not member.isfile():
          continue
        name = os.path.normpath(member.name)
        if name.endswith('.tar'):
          return 'nested'
        key, ending = _split_key(name)
        labelled.setdefault(key, set()).add(ending)
  except (tarfile.TarError, OSError):
    # Whoever opens it says what is wrong with it.
    pass
  for key, endings in labelled.items():
    if any(f'.{ending}' in known for ending in endings):
      loose = {'json', 'txt'} if '/' not in key else set()
      if endings & {'cls', *loose}:
        return 'shard'
  return 'plain'


def _split_key(name: str) -> tuple[str, str]:
  """A member's key, and the rest of its name in lower case."""
  folder, slash, base = name.rpartition('/')
  key, _, ending = base.partition('.')
  return f'{folder}{slash}{key}', ending.lower()


# Walking the headers of many shards takes minutes; sizes and times tell whether
# they are the same ones.
@functools.lru_cache(maxsize=2)
def _open(
  path: str, manifest: tuple[tuple[str, int, int], ...]
) -> picture_set.PictureSet:
  paths = [file for file, _, _ in manifest]
  shown = _shorten(paths)
  plan = roles.plan(_roles(paths, shown), path, 'shards')
  number = {name: i for i, name in enumerate(shown)}
  used = [number[part] for split in picture_set.SPLITS
          for part in plan.parts[split]]  # fmt: skip
  found = _Found(paths, shown, path)
  unended = [shown[shard] for shard in used if not tars.has_end(paths[shard])]
  for shard in used:
    found.add(shard, tars.list_tar(paths[shard]))
  members = found.finish()
  if unended:
    members.notes += (
      f'{len(unended):,} shards may be cut short, as they have no end mark, '
      f'such as {unended[0]}',
    )
  labelled = shard_labels.read_classes(
    members.labels[:, :, 0] >= 0, members.read_label, members.name, path
  )
  is_val = plan.find_val(shown, members.shards, members.distinct_names)
  splits = {
    'train': members.split(np.flatnonzero(~is_val), labelled),
    'val': members.split(np.flatnonzero(is_val), labelled),
  }
  return picture_set.PictureSet(
    path,
    splits,
    labelled.names,
    plan.origin,
    (*labelled.notes, *members.notes, *roles.gaps(shown, 'shards')),
    members.skipped,
    members.bad,
  )


def _shorten(paths: Sequence[str]) -> list[str]:
  """Names of shards that tell them apart."""
  bases = [os.path.basename(file) for file in paths]
  if len(set(bases)) == len(bases):
    return bases
  folder = os.path.commonpath([os.path.dirname(file) or '.' for file in paths])
  return [os.path.relpath(file, folder) for file in paths]


def _roles(paths: Sequence[str], shown: Sequence[str]) -> dict[str, str]:
  """The split of each shard, by its name, or by the folder that it is in."""
  folders = [os.path.basename(os.path.dirname(file)) for file in paths]
  # A folder that holds all of them tells none apart.
  apart = len(set(folders)) > 1
  return {
    name: roles.role(os.path.basename(file))
    or (roles.role(folder) if apart else '')
    for name, file, folder in zip(shown, paths, folders, strict=True)
  }


class _Members:
  """Pictures of all shards, in order, and where their labels are.

  Attributes:
    paths: of the shards.
    shards: index of the shard of each picture.
    keys: key and ending of each picture.
    spans: (offset, bytes) of each picture.
    labels: spans of each one's `.cls`, `.json` and `.txt`, (-1, 0) for none.
    notes: see `picture_set.PictureSet`.
    skipped: see there.
    bad: see there.
  """

  def __init__(
    self,
    paths: Sequence[str],
    shown: Sequence[str],
    shards: Int[np.ndarray, '_'],
    keys: packed_names.PackedNames,
    spans: Int[np.ndarray, 'n 2'],
    labels: Int[np.ndarray, 'n 3 2'],
  ):
    self.paths, self._shown, self.shards = paths, shown, shards
    self.keys, self.spans, self.labels = keys, spans, labels
    self._readers: list[tars.SpanReader] | None = None
    self.notes: tuple[str, ...] = ()
    self.skipped: Mapping[str, int] = {}
    self.bad: tuple[picture_set.Bad, ...] = ()

  def name(self, index: int) -> str:
    """The shard, key and ending of a picture."""
    return f'{self._shown[self.shards[index]]}/{self.keys[index]}'

  def distinct_names(self) -> Sequence[str]:
    """The keys; with their shards, if keys begin anew in each of them."""
    if len(set(self.keys)) == len(self.keys):
      return self.keys
    return [self.name(index) for index in range(len(self.keys))]

  def read_label(self, index: int, kind: int) -> bytes | None:
    """Reads the label of a picture in one of the kinds; None without one."""
    if self.labels[index, kind, 0] < 0:
      return None
    if self._readers is None:
      self._readers = [
        tars.SpanReader(self.paths, self.shards, self.labels[:, each])
        for each in range(len(shard_labels.KINDS))
      ]
    return self._readers[kind](index)

  def take(self, indices: Int[np.ndarray, '_']) -> '_Members':
    """Some of the pictures."""
    return _Members(
      self.paths,
      self._shown,
      self.shards[indices],
      self.keys.take(indices),
      self.spans[indices],
      self.labels[indices],
    )

  def split(
    self, indices: Int[np.ndarray, '_'], labelled: classes.Classes
  ) -> picture_set.Split:
    """Some of the pictures, as a split."""
    labels = labelled.labels[indices]
    keys, spans = self.keys.take(indices), self.spans[indices]
    return picture_set.Split(
      packed_names.PackedNames(self.name(int(i)) for i in indices),
      spans[:, 1],
      labels,
      tars.SpanReader(self.paths, self.shards[indices], spans),
      picture_set.digest(labelled.names, keys, spans[:, 1], labels),
    )


class _Found:
  """Gathers the members of one shard after the other."""

  def __init__(self, paths: Sequence[str], shown: Sequence[str], path: str):
    """Begins without any; `path` is that of the set, for errors."""
    self._paths, self._shown, self._path = paths, shown, path
    self._known = pictures.suffixes()
    self._keys: list[str] = []
    # As arrays: a million pictures have twelve million numbers.
    self._numbers = array.array('q')
    # Pictures such as KEY.image.jpg, by that ending.
    self._longer: collections.Counter[str] = collections.Counter()
    self._is_longer = bytearray()
    self._several = ''
    self._without: list[str] = []
    self._replaced: list[str] = []
    self._skipped: collections.Counter[str] = collections.Counter()
    self._bad: list[picture_set.Bad] = []

  def add(self, shard: int, listing: layout.Listing) -> None:
    """Adds the members of a shard."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    files = listing.files.items()
    for name, file in sorted(files, key=lambda item: item[1].offset):
      key, ending = _split_key(name)
      groups.setdefault(key, {})[ending] = file.offset, file.size
    self._replaced += [f'{self._shown[shard]}/{n}' for n in listing.replaced]
    self._bad += [
      picture_set.Bad(f'{self._shown[shard]}/{bad.path}', bad.reason)
      for bad in listing.bad
    ]
    for key, members in groups.items():
      self._add_key(shard, key, members)

  def _add_key(
    self, shard: int, key: str, members: Mapping[str, tuple[int, int]]
  ) -> None:
    shown = self._shown[shard]
    short = [e for e in members if f'.{e}' in self._known]
    longer = [e for e in members if f'.{e.rpartition(".")[2]}' in self._known]
    found = sorted(
      short or longer,
      key=lambda e: _PREFERRED.index(e) if e in _PREFERRED else len(_PREFERRED),
    )
    for ending in members:
      if ending not in (*shard_labels.KINDS, *found[:1]):
        self._skipped['.' + ending.rpartition('.')[2] if ending else
                      'no suffix'] += 1  # fmt: skip
    if not found:
      self._without.append(f'{shown}/{key}')
      return
    if len(found) > 1 and not self._several:
      self._several = f'{shown}/{key} is both .{found[0]} and .{found[1]}'
    ending = found[0]
    offset, size = members[ending]
    if not size:
      name = f'{shown}/{key}.{ending}'
      self._bad.append(picture_set.Bad(name, 'the file is empty'))
      return
    self._keys.append(f'{key}.{ending}')
    self._is_longer.append(not short)
    if not short:
      self._longer.update(found)
    self._numbers.extend((shard, offset, size))
    for kind in shard_labels.KINDS:
      self._numbers.extend(members.get(kind, (-1, 0)))

  def finish(self) -> _Members:
    """Returns all pictures; DataError if there are none."""
    if not self._keys:
      kinds = [f'{n:,} {suffix}' for suffix, n in self._skipped.most_common(8)]
      there = f' (they have {", ".join(kinds)})' if kinds else ''
      raise errors.DataError(
        f'the shards of {self._path} hold no images{there}; wanted members as '
        'KEY.jpg and KEY.cls'
      )
    table = np.array(self._numbers, np.int64).reshape(len(self._keys), -1)
    members = _Members(
      self._paths,
      self._shown,
      table[:, 0].astype(np.int32),
      packed_names.PackedNames(self._keys),
      table[:, 1:3].copy(),
      table[:, 3:].reshape(len(table), len(shard_labels.KINDS), 2).copy(),
    )
    is_longer = np.frombuffer(bytes(self._is_longer), np.uint8).astype(bool)
    if not is_longer.all():
      self._without += [members.name(int(i)) for i in np.flatnonzero(is_longer)]
      if is_longer.any():
        members = members.take(np.flatnonzero(~is_longer))
    elif len(self._longer) > 1:
      first, second = sorted(self._longer)[:2]
      raise errors.DataError(
        f'the shards of {self._path} have pictures named KEY.{first} and '
        f'KEY.{second}, and it is not clear which to take; wanted KEY.jpg: '
        'rename them'
      )
    notes = []
    if self._several:
      notes.append(f'of several pictures of a key one is read: {self._several}')
    if self._replaced:
      notes.append(
        f'{len(self._replaced):,} members come several times in their shard, '
        f'such as {self._replaced[0]}, and the last of each is read: shards '
        'with equal keys cannot be joined to one tar'
      )
    if self._without:
      notes.append(
        f'{len(self._without):,} keys have no picture, such as '
        f'{self._without[0]}'
      )
    members.notes = tuple(notes)
    members.skipped, members.bad = dict(self._skipped), tuple(self._bad)
    return members
