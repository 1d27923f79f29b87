"""What a token cache tells of itself, and how its records lie.

A record is the fields of the index one after another, little-endian and without
padding: each of them for the image and for its mirror image, then the label.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfboottok_jax import errors

VERSION = 1
DTYPES = ('float16', 'float32')
# The image, and its mirror image.
SIDES = 2
_LABEL = {'name': 'label', 'shape': [], 'dtype': 'int32'}


@dataclasses.dataclass(frozen=True)
class Split:
  """What is told of a split.

  Attributes:
    count: number of images.
    shards: number of files that they lie in.
    fingerprint: that of the images.
  """

  count: int
  shards: int
  fingerprint: str

  def bounds(self, shard: int) -> tuple[int, int]:
    """The first image of a shard, and the first after it."""
    first, end = (s * self.count // self.shards for s in (shard, shard + 1))
    return first, end

  def shard_of(self, image: int) -> int:
    """The shard of an image, the inverse of `bounds`."""
    return -(-(image + 1) * self.shards // self.count) - 1


@dataclasses.dataclass(frozen=True)
class Index:
  """Everything that must be equal for two commands to write one cache.

  Attributes:
    image_size: side of the images.
    dtype: of the numbers as stored, one of DTYPES.
    shapes: of the fields of an image, in the order of a record; one is 'codes'.
    class_names: of the labels.
    made_by: the networks that encoded: 'tokenizer', a fingerprint, 'teacher',
      a name, 'align_mode', and whatever else their numbers depend on.
    splits: by name.

  Raises:
    ConfigError: a type that is not stored, or shards without images.
  """

  image_size: int
  dtype: str
  shapes: Mapping[str, tuple[int, ...]]
  class_names: tuple[str, ...]
  made_by: Mapping[str, str]
  splits: Mapping[str, Split]

  def __post_init__(self):
    """Refuses what cannot be stored."""
    if self.dtype not in DTYPES:
      raise errors.ConfigError(
        f'--dtype={self.dtype}; wanted one of {", ".join(DTYPES)}'
      )
    for name, split in self.splits.items():
      if not 1 <= split.shards <= split.count:
        raise errors.ConfigError(
          f'--shards={split.shards} of the {split.count:,} images of {name}; '
          'wanted 1 or more, and no more than images'
        )

  @property
  def stored(self) -> np.dtype:
    """The type of the numbers in a record."""
    return np.dtype(self.dtype).newbyteorder('<')

  @property
  def record_bytes(self) -> int:
    """Size of a record."""
    numbers = sum(math.prod(shape) for shape in self.shapes.values())
    return SIDES * numbers * self.stored.itemsize + 4

  def to_json(self) -> dict[str, Any]:
    """As in the file."""
    fields = [
      {'name': name, 'shape': [SIDES, *shape], 'dtype': self.dtype}
      for name, shape in self.shapes.items()
    ]
    return {
      'version': VERSION,
      'image_size': self.image_size,
      'fields': [*fields, _LABEL],
      'class_names': list(self.class_names),
      'made_by': dict(self.made_by),
      'splits': {k: dataclasses.asdict(v) for k, v in self.splits.items()},
    }

  @classmethod
  def from_json(cls, told: Mapping[str, Any]) -> 'Index':
    """Inverse of `to_json`; KeyError, ValueError or the like for others."""
    *fields, _ = told['fields']
    index = cls(
      told['image_size'],
      fields[0]['dtype'],
      {f['name']: tuple(f['shape'][1:]) for f in fields},
      tuple(told['class_names']),
      told['made_by'],
      {name: Split(**split) for name, split in told['splits'].items()},
    )
    named = {'tokenizer', 'teacher', 'align_mode'} <= index.made_by.keys()
    if not named or 'codes' not in index.shapes or index.to_json() != told:
      raise ValueError('it holds what no cache does')
    return index

  def digest(self, split: str) -> str:
    """sha256 of all that concerns a split, which its other files repeat."""
    told = self.to_json() | {'splits': dataclasses.asdict(self.splits[split])}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()

  def differences(self, other: 'Index') -> list[str]:
    """Where another index differs; of splits, those that both have."""
    common = self.splits.keys() & other.splits.keys()
    mine, theirs = (
      _flatten(
        i.to_json()
        | {'splits': {k: dataclasses.asdict(i.splits[k]) for k in common}}
      )
      for i in (self, other)
    )
    return [
      f'{key} is {_shown(mine.get(key))} there, {_shown(theirs.get(key))} here'
      for key in sorted(mine.keys() | theirs.keys())
      if mine.get(key) != theirs.get(key)
    ]


def pack(
  index: Index, fields: Mapping[str, np.ndarray], labels: np.ndarray
) -> list[bytes]:
  """Records of a batch: [b, 2, ...] for each field, and labels [b]."""
  arrays = [np.ascontiguousarray(fields[k], index.stored) for k in index.shapes]
  whole = np.ascontiguousarray(labels, '<i4')
  return [
    b''.join([*(array[i].tobytes() for array in arrays), whole[i].tobytes()])
    for i in range(len(whole))
  ]


def unpack(
  index: Index, record: bytes, names: Sequence[str], sides: slice
) -> dict[str, Any]:
  """Some fields of a record, float32 [sides, ...], and the label.

  Only what is asked for is converted, which is what reading takes.
  """
  out, offset = {}, 0
  for name, shape in index.shapes.items():
    size = SIDES * math.prod(shape)
    if name in names:
      flat = np.frombuffer(record, index.stored, size, offset)
      out[name] = flat.reshape(SIDES, *shape)[sides].astype(np.float32)
    offset += size * index.stored.itemsize
  return {**out, 'label': int(np.frombuffer(record, '<i4', 1, offset)[0])}


def _flatten(told: Any, key: str = '') -> dict[str, Any]:
  """Nested objects to one with dotted keys; fields by their names."""
  if key == 'fields':
    told = {f['name']: {'shape': f['shape'], 'dtype': f['dtype']} for f in told}
  if not isinstance(told, dict):
    return {key: told}
  flat = {}
  for name, value in told.items():
    flat |= _flatten(value, f'{key}.{name}' if key else name)
  return flat


def _shown(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 40 else f'{text[:37]}...'
