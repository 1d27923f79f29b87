"""The numbers that a run logged in its metrics.jsonl."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfboottok_jax import errors


class Series(NamedTuple):
  """One logged number: the steps, increasing, and its values there."""

  steps: Int[np.ndarray, ' n']
  values: Float[np.ndarray, ' n']


Metrics = Mapping[str, Series]  # By name, such as 'val/psnr'.


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Series]:
  """Reads metrics.jsonl, or that file of a workdir, into series by name.

  Each line is an object with an integer `step` and numbers. Of two lines with
  the same step and name the later one counts: a resumed run writes again what
  it had written after its last checkpoint. A torn last line (the run was
  killed, or is writing) is left out; a torn line before it is an error.
  """
  path = pathlib.Path(path)
  path = path / 'metrics.jsonl' if path.is_dir() else path
  try:
    lines = path.read_bytes().splitlines()
  except OSError as error:
    raise errors.UserError(
      f'Metrics {path} cannot be read ({error.strerror}); give a workdir or '
      f'its metrics.jsonl.'
    ) from error
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
  points: dict[str, dict[int, float]] = {}
  for number, line in numbered:
    try:
      entry = json.loads(line)
    except ValueError as error:
      if number == numbered[-1][0]:
        break
      raise errors.UserError(
        f'Line {number} of {path} is torn or is not JSON ({line[:60]!r}); '
        f'remove that line to draw the rest.'
      ) from error
    step, values = _checked(entry, number, path)
    for name, value in values.items():
      points.setdefault(name, {})[step] = value
  return {
    name: Series(
      np.array(sorted(by_step), np.int64),
      np.array([by_step[step] for step in sorted(by_step)], np.float64),
    )
    for name, by_step in points.items()
  }


def _checked(
  entry: object, number: int, path: pathlib.Path
) -> tuple[int, dict[str, float]]:
  values = dict(entry) if isinstance(entry, dict) else {}
  step = values.pop('step', None)
  if type(step) is not int or not all(
    value is None or type(value) in (int, float) for value in values.values()
  ):
    raise errors.UserError(
      f'Line {number} of {path} is not a line of metrics; wanted an object '
      f'with an integer "step" and numbers, as {{"step": 10, "loss": 0.5}}.'
    )
  return step, {
    name: float('nan') if value is None else float(value)
    for name, value in values.items()
  }


def baselines(name: str, metrics: Metrics) -> dict[str, float]:
  """Last values of the trivial predictors logged beside a metric.

  `val/psnr_mean_image` is the baseline `mean image` of `val/psnr`.
  """
  return {
    key.removeprefix(f'{name}_').replace('_', ' '): float(series.values[-1])
    for key, series in metrics.items()
    if key.startswith(f'{name}_mean_')
  }
