"""Mean and deviation of the codes of a token cache, from sums of its shards."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Of the codes of a split's images, not of their mirror images.

  Attributes:
    count: number of images.
    mean: over everything.
    std: over everything.
    channel_mean: of every channel, over images and tokens.
    channel_std: likewise.
  """

  count: int
  mean: float
  std: float
  channel_mean: tuple[float, ...]
  channel_std: tuple[float, ...]

  @classmethod
  def from_json(cls, told: Mapping[str, Any]) -> 'Statistics':
    """Of `dataclasses.asdict` that went through a file."""
    values = {
      k: tuple(v) if isinstance(v, list) else v for k, v in told.items()
    }
    return cls(**values)


class Sums:
  """Running sums over codes, in float64.

  Attributes:
    images: so many were added.
    rows: so many vectors were added, a few to each image.
    total: their sum.
    square: the sum of their squares.
  """

  def __init__(self, images: int = 0, rows: int = 0, total=0.0, square=0.0):
    """Starts from nothing, or from sums that were written down."""
    self.images, self.rows = images, rows
    self.total = np.asarray(total, np.float64)
    self.square = np.asarray(square, np.float64)

  def add(self, codes: Float[np.ndarray, 'b *k e']) -> None:
    """Takes in a batch."""
    wide = codes.astype(np.float64).reshape(-1, codes.shape[-1])
    self.images += len(codes)
    self.rows += len(wide)
    self.total = self.total + wide.sum(0)
    self.square = self.square + np.square(wide).sum(0)

  def to_json(self) -> dict[str, Any]:
    """The arguments, for a file: not a bit is lost."""
    return {
      'images': self.images,
      'rows': self.rows,
      'total': self.total.tolist(),
      'square': self.square.tolist(),
    }


def combine(parts: Iterable[Sums]) -> Statistics:
  """The statistics of all that was added to any of `parts`, one or more."""
  parts = list(parts)
  rows = sum(part.rows for part in parts)
  mean = sum(part.total for part in parts) / rows
  power = sum(part.square for part in parts) / rows
  # Rounding may leave a constant channel a variance just below 0.
  std = np.sqrt(np.maximum(power - mean**2, 0))
  whole = float(mean.mean())
  return Statistics(
    count=sum(part.images for part in parts),
    mean=whole,
    std=float(np.sqrt(max(power.mean() - whole**2, 0))),
    channel_mean=tuple(mean.tolist()),
    channel_std=tuple(std.tolist()),
  )
