"""Classes of pictures in WebDataset shards, by the files beside each picture.

They are those of `.cls` (a number from 0, or a name), else of `.json` (see
NUMBER_KEYS and NAME_KEYS), else of `.txt`, unless its texts are captions.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from selfboottok_jax import errors
from selfboottok_jax.data import classes

# Endings of the files that hold labels, in the order in which they count.
KINDS = ('cls', 'json', 'txt')
_CLS, _JSON, _TXT = range(len(KINDS))
# Members of a JSON object that hold a class; the first that is there counts.
NUMBER_KEYS = (
  'label', 'cls', 'class', 'class_id', 'class_index', 'class_idx', 'label_id',
  'label_index', 'category_id', 'target',
)  # fmt: skip
NAME_KEYS = (
  'class_name', 'classname', 'label_name', 'label_text', 'category',
  'category_name', 'synset', 'wnid', *NUMBER_KEYS,
)  # fmt: skip
# A class has a name, a caption hardly ever comes twice.
_PICTURES_PER_NAME = 2
_LONGEST_NAME = 100
# A numbered class takes the name that this many of its pictures agree on.
_WITNESSES = 16

# Reads the file of a kind beside a picture; None where there is none.
Reader = Callable[[int, int], bytes | None]
# Names a picture, for errors.
Name = Callable[[int], str]


def read_classes(
  has: Bool[np.ndarray, 'n kinds'], read: Reader, name: Name, path: str
) -> classes.Classes:
  """Reads the labels of all pictures of a set.

  Args:
    has: which pictures have a label of which of KINDS.
    read: reads one.
    name: names a picture, for errors.
    path: of the set, for errors.

  Raises:
    DataError: some pictures have a label, and some have none.
  """
  count = len(has)
  if has[:, _CLS].any():
    _require_all(has[:, _CLS], name, path, '.cls beside it')
    codes, texts = _code(_read_cls(count, read, name, path), count)
    if not classes.are_numbers(texts):
      return classes.from_texts(codes, texts, name)
    values = np.array([int(text) for text in texts], np.int64)[codes]
    return _with_names(
      classes.from_numbers(values, (), name),
      lambda index: _name_beside(read, index),
    )
  if has[:, _JSON].any():
    found = _from_json(count, read, name, path)
    if found is not None:
      return found
  if has[:, _TXT].any():
    return _from_txt(read, has[:, _TXT], name, path)
  kinds = 'neither .cls nor .txt beside them'
  if has[:, _JSON].any():
    kinds = f'no .cls, and none of {", ".join(NUMBER_KEYS[:3])} in their .json'
  return classes.none(count, f'no classes: pictures have {kinds}')


def _require_all(
  has: Bool[np.ndarray, '_'], name: Name, path: str, what: str
) -> None:
  """Raises DataError if some pictures have what others have not."""
  lacking = np.flatnonzero(~has)
  if len(lacking):
    raise errors.DataError(
      f'{path}: {name(int(lacking[0]))} has no {what}, as have '
      f'{len(lacking):,} of {len(has):,} images; wanted a label for '
      'all or for none'
    )


def _code(
  texts: Iterator[str], count: int
) -> tuple[Int[np.ndarray, '_'], list[str]]:
  """Numbers texts as they come: indices, and the distinct texts."""
  known: dict[str, int] = {}
  codes = np.fromiter(
    (known.setdefault(text, len(known)) for text in texts), np.int32, count
  )
  return codes, list(known)


def _read_cls(count: int, read: Reader, name: Name, path: str) -> Iterator[str]:
  for index in range(count):
    text = _text(read(index, _CLS) or b'')
    if not text or len(text) > _LONGEST_NAME:
      raise errors.DataError(
        f'{path}: the .cls of {name(index)} is {text[:40]!r}; wanted '
        'the number of a class, or its name'
      )
    yield text


def _text(data: bytes) -> str:
  return data.decode('utf-8-sig', 'replace').strip().strip('\0')


def _from_json(
  count: int, read: Reader, name: Name, path: str
) -> classes.Classes | None:
  """Labels of JSON objects; None if none has any."""
  numbers = np.full(count, -1, np.int64)
  has_number = np.zeros(count, np.bool_)
  known: dict[str, int] = {}
  codes = np.full(count, -1, np.int32)
  for index in range(count):
    number, text = _parse(read(index, _JSON))
    if number is not None:
      numbers[index], has_number[index] = number, True
    if text is not None:
      codes[index] = known.setdefault(text, len(known))
  names = list(known)
  if has_number.all():
    return _with_names(
      classes.from_numbers(numbers, (), name),
      lambda index: names[codes[index]] if codes[index] >= 0 else None,
    )
  has = has_number | (codes >= 0)
  if not has.any():
    return None
  _require_all(has, name, path, 'label in a .json beside it')
  # Without numbers for all, names; and numbers where those lack.
  for lacking in np.flatnonzero(codes < 0):
    text = str(numbers[lacking])
    codes[lacking] = known.setdefault(text, len(known))
  return classes.from_texts(codes, list(known), name)


def _parse(data: bytes | None) -> tuple[int | None, str | None]:
  """The number and the name of a class in a JSON object."""
  try:
    # Numbers of any length, which int() would refuse.
    found = json.loads(data) if data else None
  except (ValueError, RecursionError):
    return None, None
  if not isinstance(found, dict):
    return None, None
  number: int | None = None
  for key in NUMBER_KEYS:
    value = found.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
      number = value if abs(value) < 2**31 else None
    elif isinstance(value, str) and re.fullmatch(r'\d{1,9}', value.strip()):
      number = int(value)
    if number is not None:
      break
  names = (found.get(key) for key in NAME_KEYS)
  name = next(
    (
      text
      for value in names
      if isinstance(value, str) and (text := value.strip())
      if not text.isdigit()
    ),
    None,
  )
  return number, name


def _from_txt(
  read: Reader, has: Bool[np.ndarray, '_'], name: Name, path: str
) -> classes.Classes:
  """Labels of texts that are names of classes, by how often each comes."""
  count = len(has)
  texts = (_text(read(index, _TXT) or b'') for index in range(count))
  codes, distinct = _code(texts, count)
  longest = max(map(len, distinct))
  if (
    len(distinct) * _PICTURES_PER_NAME > count
    or longest > _LONGEST_NAME
    or any('\n' in text for text in distinct)
  ):
    return classes.none(
      count,
      f'no classes: the .txt of {count:,} images hold {len(distinct):,} texts '
      f'of up to {longest:,} characters, which are taken for captions',
    )
  lacks = np.isin(codes, [i for i, text in enumerate(distinct) if not text])
  _require_all(has & ~lacks, name, path, 'class in a .txt beside it')
  found = classes.from_texts(codes, distinct, name)
  note = f'the {len(distinct):,} different texts of .txt are taken for classes'
  return classes.Classes(found.labels, found.names, (*found.notes, note))


def _with_names(
  found: classes.Classes, name: Callable[[int], str | None]
) -> classes.Classes:
  """Names numbered classes, if pictures of each agree on a name of its own.

  Args:
    found: classes named by their numbers.
    name: what a picture's class is called, None if unknown.
  """
  order = np.argsort(found.labels, kind='stable')
  starts = np.searchsorted(found.labels[order], range(len(found.names) + 1))
  names = list(found.names)
  for label, (start, end) in enumerate(itertools.pairwise(starts)):
    same = order[start:end]
    witnesses = same[:: max(len(same) // _WITNESSES, 1)][:_WITNESSES]
    given = {name(int(index)) for index in witnesses}
    if len(given) > 1:
      return found
    # Numbers without pictures keep their number.
    for each in given:
      if each is None:
        return found
      names[label] = each
  if len(set(names)) < len(names):
    return found
  return classes.Classes(found.labels, tuple(names), found.notes[1:])


def _name_beside(read: Reader, index: int) -> str | None:
  """Reads the class name of a picture from its `.json`, or else its `.txt`."""
  _, name = _parse(read(index, _JSON))
  if name is None and (data := read(index, _TXT)) is not None:
    text = _text(data)
    if text and '\n' not in text and len(text) <= _LONGEST_NAME:
      name = text
  return name
