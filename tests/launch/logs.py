"""The log of a run, as tests read it."""

import json
import pathlib

from selfboottok_jax.training import logging

# Fields that depend on the speed of the machine, not on the computation.
RATES = ('images_per_second', 'data_wait', 'seconds')


def read(workdir: pathlib.Path, *, rates: bool = False) -> list[dict]:
  """Every line of a run's metrics, with its rates where wanted."""
  lines = (workdir / logging.METRICS).read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if rates or k not in RATES}
    for line in lines
  ]
