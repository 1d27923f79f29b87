"""Reconstructions of the same pictures by several tokenizers."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import errors, inference, pixels
from selfboottok_jax.evaluation import scores

# A difference of 255 / GAIN or more has the last colour of a map.
GAIN = 4
_COLOURS = 'magma'
ORIGINALS = 'Originals'


@dataclasses.dataclass(frozen=True)
class Row:
  """Pictures of a comparison.

  Attributes:
    label: unique in the comparison.
    images: as many as there are originals, and of their size.
    psnr: mean over these images, in dB; None for the originals.
  """

  label: str
  images: UInt8[np.ndarray, 'm h w 3']
  psnr: float | int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The same pictures by row: originals, then what tokenizers make of them."""

  rows: Sequence[Row]
  protocol: str

  def __post_init__(self) -> None:
    """Refuses equal labels, unequal shapes, and rows without a protocol."""
    scores.check_protocol(self.protocol, 'the reconstruction comparison')
    need_distinct([row.label for row in self.rows], 'Rows of a comparison')
    shapes = {row.label: row.images.shape for row in self.rows}
    if len(set(shapes.values())) != 1:
      raise errors.UserError(
        'A comparison needs as many images of one size in each row; the rows '
        f'have the shapes {shapes}.'
      )

  def differences(self, row: Row) -> UInt8[np.ndarray, 'm h w 3'] | None:
    """Maps the differences of a row from the originals; None for these."""
    if row is self.rows[0]:
      return None
    return map_differences(self.rows[0].images, row.images)


def need_distinct(names: Sequence[str], what: str) -> None:
  """Raises UserError if two names are equal."""
  if len(set(names)) < len(names):
    raise errors.UserError(
      f'{what} need different names in one report; given {list(names)}.'
    )


def map_differences(
  originals: UInt8[np.ndarray, 'm h w 3'],
  images: UInt8[np.ndarray, 'm h w 3'],
) -> UInt8[np.ndarray, 'm h w 3']:
  """Colours each pixel by its absolute difference, the mean over channels.

  Black is none, and the lightest colour a difference of 255 / GAIN or more.
  """
  import matplotlib

  table = matplotlib.colormaps[_COLOURS](np.arange(256), bytes=True)[:, :3]
  difference = np.abs(originals.astype(np.int16) - images).mean(axis=-1)
  levels = np.minimum(GAIN * difference, 255).astype(np.uint8)
  return np.asarray(table, np.uint8)[levels]


def compare(
  originals: UInt8[np.ndarray, 'm h w 3'],
  tokenizers: Mapping[str, inference.Tokenizer],
  source: str,
) -> Comparison:
  """Reconstructs pictures with every tokenizer.

  Args:
    originals: pictures of the tokenizers' size.
    tokenizers: by the label of their row.
    source: description of the pictures.
  """
  rows = [Row(ORIGINALS, originals)]
  for label, tokenizer in tokenizers.items():
    # One at a time: large pictures may not fit beside each other.
    made = np.concatenate(
      [
        np.asarray(
          pixels.to_uint8(tokenizer.decode(tokenizer.encode(one)), 'round')
        )
        for one in np.split(originals, len(originals))
      ]
    )
    psnr = float(np.mean(scores.psnr(originals, made)))
    rows.append(Row(label, made, psnr))
  steps = ', '.join(f'{k} at {t.step:,}' for k, t in tokenizers.items())
  return Comparison(
    rows,
    f'{len(originals)} pictures of {source}, centre crops; PSNR of these '
    f'pictures, data range 1, per image then mean; EMA weights; steps: {steps}',
  )
