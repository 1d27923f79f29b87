"""Small WebDataset shards."""

import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import picture_set, shards
from tests.data import forms, trees


def keys(count, start=0):
  return [f'{i:04}' for i in range(start, start + count)]


def members(names, **others):
  """Pictures and, by ending, what a function makes of a key's index."""
  return [
    member
    for i, key in enumerate(names)
    for member in (
      (f'{key}.jpg', trees.png(i)),
      *((f'{key}.{ending}', make(i)) for ending, make in others.items()),
    )
  ]


def cls(i):
  return str(i % 3).encode()


def write(root, *names, count=4, **others):
  others = others or {'cls': cls}
  for number, name in enumerate(names):
    forms.write_tar(root / name, members(keys(count, count * number), **others))
  return root


def read(path):
  return shards.open_shards(str(path))


def all_labels(found):
  return {
    found.splits[split].names[i].rpartition('/')[2].split('.')[0]: label
    for split in picture_set.SPLITS
    for i, label in enumerate(found.splits[split].labels.tolist())
  }


def one(tmp_path, contents):
  return read(forms.write_tar(tmp_path / 'a.tar', contents))


def refusal(path):
  with pytest.raises(errors.DataError) as caught:
    read(path)
  assert '\n' not in str(caught.value)
  return str(caught.value)
