"""Grids of times that the records of samplers have."""

import numpy as np


def shifted(num_steps: int, shift: float) -> np.ndarray:
  """LightningDiT's, from its noise at 0 to its data at 1."""
  t = np.linspace(0, 1, num_steps)
  return shift * t / (1 + (shift - 1) * t)
