"""Holds the arrays of a weight file against those that a network wants."""

import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from selfboottok_jax import errors

Shapes = Mapping[str, tuple[int, ...]]
# From the name and the wanted shape of an array to the array.
Take = Callable[..., Any]

_SHOWN = 4


def check(
  arrays: Mapping[str, np.ndarray],
  wanted: Shapes,
  network: str,
  source: str,
  unused: Collection[str] = (),
) -> None:
  """Raises one WeightsError that lists all that does not fit `wanted`.

  Args:
    arrays: by the names of the file.
    wanted: name to shape of every array that the network needs.
    network: name of the network, for messages.
    source: names the file in messages.
    unused: names that may be in the file and are left there; 'text_model.*'
      stands for all that begin so, see `fnmatch`.
  """
  if not set(wanted) & set(arrays):
    raise errors.WeightsError(
      f'{source} holds another network: its {len(arrays)} arrays '
      f'({_some(sorted(arrays))}) have no name in common with {network} '
      f'({_some(list(wanted))}); give a {network} file'
    )
  missing = [name for name in wanted if name not in arrays]
  extra = [
    name
    for name in arrays
    if name not in wanted
    and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)
  ]
  present = [name for name in wanted if name in arrays]
  wrong = [
    f'{name} is {arrays[name].shape}, wanted {tuple(wanted[name])}'
    for name in present
    if arrays[name].shape != tuple(wanted[name])
  ]
  broken = [name for name in present if not _is_finite(arrays[name])]
  problems = [
    f'{len(names)} {what}: {"; ".join(names)}'
    for what, names in (
      ('missing', missing),
      ('unexpected', extra),
      ('mis-shaped', wrong),
      ('not finite numbers', broken),
    )
    if names
  ]
  if problems:
    raise errors.WeightsError(
      f'{source} does not fit {network}: {" | ".join(problems)}; '
      f'give a {network} file whose arrays have the wanted names and shapes'
    )


def linear(take: Take, name: str, inputs: int, outputs: int) -> dict[str, Any]:
  """A Linear of torch as a Dense of ours."""
  return {
    'kernel': take(f'{name}.weight', outputs, inputs).T,
    'bias': take(f'{name}.bias', outputs),
  }


def norm(take: Take, name: str, width: int) -> dict[str, Any]:
  """An affine norm of torch as one of ours."""
  return {
    'scale': take(f'{name}.weight', width),
    'bias': take(f'{name}.bias', width),
  }


def shape_of(
  arrays: Mapping[str, np.ndarray], name: str, ndim: int
) -> tuple[int, ...]:
  """The shape of an array that tells sizes.

  Raises:
    KeyError: there is none of that name.
    ValueError: it has another number of axes.
  """
  if name not in arrays:
    raise KeyError(f'no {name}')
  if arrays[name].ndim != ndim:
    raise ValueError(f'{name} is {arrays[name].shape}')
  return arrays[name].shape


def _is_finite(array: np.ndarray) -> bool:
  if not np.issubdtype(array.dtype, np.number):
    return False
  return bool(np.isfinite(array).all())


def _some(names: list[str]) -> str:
  tail = ', ...' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + tail
