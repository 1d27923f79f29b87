"""What a report is made of."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import errors
from selfboottok_jax.evaluation import cost


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run; `metrics` is its metrics.jsonl, or None for no curves."""

  name: str
  workdir: str
  task: str
  steps: int
  seconds: float | int
  metrics: str | os.PathLike[str] | None = None


@dataclasses.dataclass(frozen=True)
class Score:
  """A measured number, its direction (None: neither) and how it was measured.

  The protocol names backend, weights, image count, crop, reference set, step,
  and EMA or raw parameters.
  """

  run: str
  metric: str
  value: float | int
  higher_is_better: bool | None
  protocol: str

  def __post_init__(self):
    """Refuses a number without its protocol."""
    _need_protocol(self.protocol, f'the score {self.metric} of {self.run}')


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """A row of the comparison; `psnr` in dB, None for the originals."""

  label: str
  images: UInt8[np.ndarray, 'm h w 3']
  psnr: float | int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The same images by row: originals, then stages in training order."""

  rows: Sequence[Reconstruction]
  protocol: str

  def __post_init__(self):
    """Refuses rows that cannot be told apart, or have no protocol."""
    _need_protocol(self.protocol, 'the reconstruction comparison')
    _need_distinct([row.label for row in self.rows], 'Rows of a comparison')


@dataclasses.dataclass(frozen=True)
class Samples:
  """Generated images by class name, as many for each class."""

  classes: Mapping[str, UInt8[np.ndarray, '...']]
  protocol: str

  def __post_init__(self):
    """Refuses pictures without their protocol."""
    _need_protocol(self.protocol, 'the samples')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What the page shows; everything but the title may be left out.

  `environment` holds versions, device, cores; `configs` a nested mapping by
  run; `costs` the card of each run.
  """

  title: str
  created: str = ''
  environment: Mapping[str, object] = dataclasses.field(default_factory=dict)
  configs: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
  runs: Sequence[Run] = ()
  comparison: Comparison | None = None
  samples: Samples | None = None
  scores: Sequence[Score] = ()
  costs: Mapping[str, cost.Card] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()

  def __post_init__(self):
    """Refuses runs that cannot be told apart."""
    _need_distinct([run.name for run in self.runs], 'Runs of a report')


def _need_protocol(protocol: str, what: str) -> None:
  if not protocol.strip():
    raise errors.UserError(
      f'No protocol was given for {what}; say how it was measured: backend, '
      f'weights, image count, crop, reference set, step, EMA or raw.'
    )


def _need_distinct(names: Sequence[str], what: str) -> None:
  if len(set(names)) < len(names):
    raise errors.UserError(
      f'{what} need different names to be told apart; given {list(names)}.'
    )
