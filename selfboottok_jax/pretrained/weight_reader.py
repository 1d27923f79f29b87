"""Reads the arrays of a weight file into the layout of our modules."""

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from selfboottok_jax import errors

# From the names of a file to its arrays.
Arrays = Mapping[str, Any]

# Names that an error lists before it breaks off.
_SHOWN = 4


class Reader:
  """Takes arrays by name, and reports all that do not fit at once.

  Where an array is missing, mis-shaped or no array of numbers, zeros stand in
  for it, so that reading goes on and `check` can list every problem in one
  message. Arrays of jax stay traced: gradients reach back to the names of the
  file.

  Attributes:
    arrays: arrays by the names of the file.
    wanted: name to shape of all that was asked for, in that order.
  """

  def __init__(self, arrays: Arrays):
    """Reads `arrays`; {} gives zeros throughout, to collect `wanted`."""
    self.arrays = arrays
    self.wanted: dict[str, tuple[int, ...]] = {}

  def take(self, name: str, *shape: int) -> Any:
    """The array of that name and shape, as float32."""
    self.wanted[name] = shape
    array = self.arrays.get(name)
    if array is None or array.shape != shape or not _is_numeric(array):
      return np.zeros(shape, np.float32)
    if isinstance(array, jax.Array):
      return array.astype(np.float32)
    return np.asarray(array, np.float32)

  def linear(self, name: str, inputs: int, outputs: int) -> dict[str, Any]:
    """A Linear of torch as a Dense of flax."""
    return {
      'kernel': self.take(f'{name}.weight', outputs, inputs).T,
      'bias': self.take(f'{name}.bias', outputs),
    }

  def conv(
    self, name: str, inputs: int, outputs: int, *window: int
  ) -> dict[str, Any]:
    """A 2D convolution of torch (OIHW) as one of flax (HWIO)."""
    kernel = self.take(f'{name}.weight', outputs, inputs, *window)
    return {
      'kernel': kernel.transpose(2, 3, 1, 0),
      'bias': self.take(f'{name}.bias', outputs),
    }

  def patch_embed(
    self, name: str, channels: int, width: int, patch_size: int
  ) -> dict[str, Any]:
    """A convolution of stride `patch_size` as a Dense on flat patches."""
    layer = self.conv(name, channels, width, patch_size, patch_size)
    # Flat patches run over (row, column, channel), as `layers.patchify` cuts.
    return {**layer, 'kernel': layer['kernel'].reshape(-1, width)}

  def norm(self, name: str, width: int) -> dict[str, Any]:
    """An affine norm of torch as one of flax."""
    return {**self.scale(name, width), 'bias': self.take(f'{name}.bias', width)}

  def scale(self, name: str, width: int) -> dict[str, Any]:
    """A norm with a gain alone."""
    return {'scale': self.take(f'{name}.weight', width)}

  def check(
    self, network: str, source: str, unused: Collection[str] = ()
  ) -> None:
    """Raises one WeightsError that lists all that did not fit.

    Args:
      network: name of the network, for messages.
      source: names the file in messages.
      unused: names that may be in the file and are left there; 'text_model.*'
        stands for all that begin so, see `fnmatch`.
    """
    arrays, wanted = self.arrays, self.wanted
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


def stack(blocks: list[Any]) -> Any:
  """Trees of one structure as one tree with a new first axis.

  This is how scanned blocks keep their parameters. numpy arrays stay numpy.
  """

  def join(*leaves: Any) -> Any:
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
      return jax.numpy.stack(leaves)
    return np.stack(leaves)

  return jax.tree.map(join, *blocks)


def shape_of(arrays: Arrays, name: str, ndim: int) -> tuple[int, ...]:
  """The shape of an array from which sizes are read.

  Raises:
    KeyError: there is none of that name.
    ValueError: it has another number of axes.
  """
  if name not in arrays:
    raise KeyError(f'no {name}')
  if arrays[name].ndim != ndim:
    raise ValueError(f'{name} is {arrays[name].shape}')
  return arrays[name].shape


def _is_numeric(array: Any) -> bool:
  # bfloat16 counts too, which numpy does not know as a number.
  return jax.numpy.issubdtype(array.dtype, np.number)


def _is_finite(array: np.ndarray) -> bool:
  return _is_numeric(array) and bool(np.isfinite(array).all())


def _some(names: list[str]) -> str:
  tail = ', ...' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + tail
