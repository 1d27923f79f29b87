"""Settings of sampling: the sampler, its steps and its guidance."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypedDict

from selfboottok_jax import errors
from selfboottok_jax.flow import guidance, samplers


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings that samples share, whatever their seed, label and index.

  Attributes:
    sampler: a key of `samplers.SAMPLERS`.
    num_steps: steps from noise to data.
    last_step: where the SDE's last, noise-free step starts.
    time_shift: puts more steps near the noise below 1, see
      `samplers.time_grid`.
    guidance_scale: strength of guidance; 1 is the plain conditional model.
    cls_guidance_scale: the same for the class token; -1 takes
      `guidance_scale`.
    guidance_low: guidance acts from this t on, where 1 is noise.
    guidance_high: guidance acts up to this t.
    guided_channels: channels of a latent that are guided, the first ones; 0 is
      all. SiT's published numbers are of 3 of 4.
  """

  sampler: str = 'sde'
  num_steps: int = 250
  last_step: float = 0.04
  time_shift: float | int = 1.0
  guidance_scale: float | int = 2.3
  cls_guidance_scale: float | int = -1.0
  guidance_low: float | int = 0.0
  guidance_high: float | int = 0.85
  guided_channels: int = 0

  def __post_init__(self) -> None:
    """Raises UserError for settings that no sampler takes."""
    # Computing the times checks the sampler, its steps and the shift.
    _ = self.times
    for name in ('guidance_scale', 'cls_guidance_scale'):
      guidance.check_scale(name, getattr(self, name))
    guidance.check_interval(self.guidance_low, self.guidance_high)
    if self.guided_channels < 0:
      raise errors.UserError(
        f'guided_channels={self.guided_channels}; wanted 0 (all) or more'
      )

  @property
  def times(self) -> samplers.Times:
    """Returns the times of the steps, from 1 (noise) down to 0 (data)."""
    return samplers.time_grid(
      self.sampler, self.num_steps, self.last_step, self.time_shift
    )

  @property
  def guides(self) -> bool:
    """True if guidance acts in any step."""
    return not self.is_unguided and any(
      samplers.is_within(float(t), *self.interval) for t in self.times[:-1]
    )

  @property
  def interval(self) -> tuple[float, float]:
    """Returns (low, high), the times between which guidance acts."""
    return float(self.guidance_low), float(self.guidance_high)

  @property
  def scales(self) -> tuple[float, float]:
    """Returns the guidance scales of the tokens and of the class token."""
    scale, cls_scale = self.guidance_scale, self.cls_guidance_scale
    return float(scale), float(scale if cls_scale == -1 else cls_scale)

  @property
  def is_unguided(self) -> bool:
    """True for the plain conditional model, which costs half."""
    return self.scales == (1.0, 1.0)

  @property
  def name(self) -> str:
    """Names a folder after the guidance; all unguided settings share one."""
    if self.is_unguided:
      return 'unguided'
    low, high = self.interval
    return f'scale{self.guidance_scale:g}_t{low:g}-{high:g}'

  def describe(self) -> str:
    """Describes the settings in words, for protocols of scores."""
    if self.is_unguided:
      guided = 'without guidance'
    else:
      low, high = self.interval
      scale, cls_scale = self.scales
      guided = f'guidance {scale:g} for t in [{low:g}, {high:g}]'
      if cls_scale != scale:
        guided += f', {cls_scale:g} on the class token'
      if self.guided_channels:
        guided += f', on the first {self.guided_channels} channels'
    last = f', last from {self.last_step:g}' if self.sampler == 'sde' else ''
    if self.time_shift != 1:
      last += f', times shifted by {self.time_shift:g}'
    return f'{self.sampler}, {self.num_steps} steps{last}, {guided}'


class Changes(TypedDict, total=False):
  """Type of the keyword arguments that change fields of `Sampling`."""

  sampler: str
  num_steps: int
  last_step: float
  time_shift: float
  guidance_scale: float
  cls_guidance_scale: float
  guidance_low: float
  guidance_high: float
  guided_channels: int


def sweep(
  base: Sampling,
  *,
  scales: Sequence[float],
  lows: Sequence[float],
  highs: Sequence[float],
) -> list[Sampling]:
  """Lists all combinations of guidance scales and intervals.

  One compiled program serves all that are guided. Without guidance intervals
  make no difference, so that setting appears once.
  """
  found: dict[str, Sampling] = {}
  for low, high, scale in itertools.product(lows, highs, scales):
    one = dataclasses.replace(
      base, guidance_low=low, guidance_high=high, guidance_scale=scale
    )
    # Names are folders: settings of one name would overwrite each other.
    found.setdefault(one.name, one)
  return list(found.values())
