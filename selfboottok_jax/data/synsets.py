"""The classes of ImageNet (ILSVRC 2012): synsets, labels and words."""

import collections
import functools
import importlib.resources
import re
from collections.abc import Mapping, Sequence

_FILE = 'imagenet_classes.tsv'
_SYNSET = re.compile(r'n\d{8}')


@functools.cache
def words() -> Mapping[str, tuple[str, ...]]:
  """Returns the words of each synset, as {'n01440764': ('tench', ...)}.

  The order is that of labels 0 to 999 in all public models and label files,
  which is that of the synsets' names.
  """
  text = (importlib.resources.files(__package__) / _FILE).read_text()
  rows = (row.split('\t') for row in text.splitlines() if row[:1] == 'n')
  return {
    synset: tuple(word.strip() for word in names.split(','))
    for synset, names in rows
  }


def is_synset(name: str) -> bool:
  """True for the name of a WordNet noun, as 'n01440764'."""
  return bool(_SYNSET.fullmatch(name))


def readable(class_names: Sequence[str]) -> tuple[str, ...]:
  """Returns class names in words: of synsets of ImageNet the first word.

  Where two classes share it, as the bird and the machine named crane, it is
  followed by the synset.
  """
  known = words()
  first = [known[name][0] if name in known else name for name in class_names]
  counts = collections.Counter(first)
  return tuple(
    word if counts[word] == 1 else f'{word} ({name})'
    for word, name in zip(first, class_names, strict=True)
  )


def find(word: str, class_names: Sequence[str]) -> list[int]:
  """Returns the labels of the classes that a word names, in any case."""
  word = word.strip().lower()
  known = words()
  shown = readable(class_names)
  return [
    label
    for label, name in enumerate(class_names)
    if word in (name.lower(), shown[label].lower())
    or word in (each.lower() for each in known.get(name, ()))
  ]


def notes(class_names: Sequence[str]) -> list[str]:
  """Returns what a user should know about classes that are synsets."""
  known = words()
  odd = [name for name in class_names if not is_synset(name)]
  if odd and 2 * len(odd) < sum(name in known for name in class_names):
    return [
      f'{len(odd):,} of {len(class_names):,} classes are no synsets, such as '
      f"{odd[0]}: labels are not ImageNet's"
    ]
  if odd or not class_names:
    return []
  others = [name for name in class_names if name not in known]
  if len(others) == len(class_names):
    return []
  if others:
    return [
      f'{len(others):,} of {len(class_names):,} classes are synsets that '
      f'ILSVRC 2012 does not have, such as {others[0]}'
    ]
  if len(class_names) == len(known):
    return ["ImageNet's 1,000 synsets, labelled in their usual order"]
  return [f"{len(class_names):,} of ImageNet's 1,000 synsets, labelled from 0"]
