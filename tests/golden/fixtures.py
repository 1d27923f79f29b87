"""Reads recorded numbers and compares with one table of tolerances."""

import dataclasses
import fnmatch
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.golden import tolerances

_HERE = pathlib.Path(__file__).parent
_DEFAULT = _HERE.parents[1] / '..' / 'shared' / 'golden'


@dataclasses.dataclass(frozen=True)
class Fixture:
  """Arrays, hyperparameters and weights of one recorded run."""

  name: str
  meta: dict[str, Any]
  arrays: dict[str, np.ndarray]
  weights: dict[str, np.ndarray]


def path(kind: str, name: str) -> pathlib.Path:
  """The fixture's file: GOLDEN, else the shared folder, else our copies."""
  explicit = os.environ.get('GOLDEN')
  file = f'{name}.npz'
  if explicit:
    given = pathlib.Path(explicit) / kind / file
    if not given.exists():
      pytest.fail(f'GOLDEN={explicit} has no {kind}/{file}')
    return given
  for known in (_DEFAULT / kind / file, _HERE / 'data' / kind / file):
    if known.exists():
      return known
  pytest.skip(
    f'{kind}/{file} is neither in {_DEFAULT} nor among the copies in '
    'tests/golden/data; set GOLDEN to the folder of recorded numbers'
  )


def load(kind: str, name: str) -> Fixture:
  """Reads fixture `name` of `kind` ('tokenizer' or 'generator')."""
  recorded = path(kind, name)
  with np.load(recorded, allow_pickle=False) as file:
    arrays = {k: file[k] for k in file.files if k != 'meta_json'}
    meta = json.loads(str(file['meta_json']))
  weights = {}
  for suffix in ('.safetensors', '.weights.safetensors'):
    beside = recorded.with_suffix('').with_name(name + suffix)
    if beside.exists():
      weights = safetensors.numpy.load_file(beside)
  return Fixture(name, meta, arrays, weights)


def check(fixture: str, array: str, actual, expected) -> None:
  """Asserts `actual` within the tolerance tabled for (fixture, array)."""
  atol, rtol, rel_l2 = _tolerance(fixture, array)
  actual, expected = np.asarray(actual), np.asarray(expected)
  label = f'{fixture}:{array}'
  assert actual.shape == expected.shape, (label, actual.shape, expected.shape)
  if atol is not None or rtol is not None:
    np.testing.assert_allclose(
      actual, expected, atol=atol or 0.0, rtol=rtol or 0.0, err_msg=label
    )
  if rel_l2 is not None:
    wide = actual.astype(np.float64) - expected.astype(np.float64)
    norm = np.linalg.norm(expected.astype(np.float64).ravel())
    ratio = np.linalg.norm(wide.ravel()) / max(norm, 1e-300)
    assert ratio <= rel_l2, f'{label}: relative L2 {ratio:.2e} > {rel_l2:.0e}'


def check_rounding(label: str, actual, expected, error) -> None:
  """Asserts `actual` within `error`, a bound for all or for each number."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, (label, actual.shape, expected.shape)
  found = excess(actual, expected, error)
  assert found <= 1, f'{label}: {found:.2f} times what rounding explains'


def excess(actual, expected, error) -> float:
  """The largest difference, as a multiple of `error`, which is above 0."""
  actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
  return float(np.max(np.abs(actual - expected) / error))


def _tolerance(fixture: str, array: str):
  for (fixture_glob, array_glob), bounds in tolerances.TABLE.items():
    if fnmatch.fnmatchcase(fixture, fixture_glob) and fnmatch.fnmatchcase(
      array, array_glob
    ):
      if all(bound is None for bound in bounds):
        raise KeyError(f'{fixture}:{array}: a row without a bound')
      return bounds
  raise KeyError(f'no tolerance is tabled for {fixture}:{array}')
