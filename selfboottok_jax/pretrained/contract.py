"""Interfaces of frozen networks, and the record of where weights are published.

Parameters travel as an argument of the call, never inside a closure, so that
a jitted step can shard them and no checkpoint holds them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors, sizes
from selfboottok_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Published:
  """A network's weights as their authors publish them.

  Attributes:
    hub: id on the Hugging Face hub; '' where the authors keep them elsewhere.
    files: names of the files, all of them needed.
    licence: licence of the weights, as an SPDX id or a name.
    millions: millions of parameters that are used here.
    use: purpose of the network in this project.
    url: page or file to fetch by hand, when `hub` is ''.
  """

  hub: str
  files: tuple[str, ...]
  licence: str
  millions: float
  use: str
  url: str = ''


@flax.struct.dataclass
class Features:
  """Features of a batch of images.

  Attributes:
    patches: Float[Array, 'b n d'], a vector per patch in raster order.
    cls: Float[Array, 'b e'], one vector per image, of its own width; None
      where there is none.
  """

  # Any: a pytree also carries shapes, specs or None in place of arrays.
  patches: Any
  cls: Any = None

  @property
  def pooled(self) -> Float[Array, 'b e']:
    """One vector per image: `cls` or, without one, the mean of the patches."""
    return self.patches.mean(axis=1) if self.cls is None else self.cls


@runtime_checkable
class FeatureNetwork(Protocol):
  """A frozen teacher: images in [-1, 1] to features.

  Attributes:
    name: name in reports, e.g. 'mobilenet_v2'.
    params: its parameters, {} when it has none.
    dim: width of a patch vector.
  """

  name: str
  params: Any
  dim: int

  def __call__(self, params: Any, images: Float[Array, 'b h w 3']) -> Features:
    """Features of images in [-1, 1]."""
    ...

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches of an image."""
    ...


@runtime_checkable
class PerceptualDistance(Protocol):
  """A differentiable distance between images in [-1, 1], zero at equality."""

  name: str
  params: Any

  def __call__(
    self,
    params: Any,
    a: Float[Array, 'b h w 3'],
    b: Float[Array, 'b h w 3'],
  ) -> Float[Array, 'b']:
    """The distance of each pair."""
    ...


@runtime_checkable
class Weighted(Protocol):
  """A network whose parameters come from a file.

  Attributes:
    name: name of the network.
    params: its parameters; None until they are loaded.
    published: place of its weights; None where a user has to name a file, or
      where nobody publishes any.
    shape_key: all that the parameters depend on besides the file.
  """

  name: str
  params: Any
  published: Published | None
  shape_key: Mapping[str, Any]

  def init(self, key: Any) -> PyTree:
    """Random parameters; traceable, so that shapes cost nothing."""
    ...

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Parameters from the arrays of a file.

    Raises:
      WeightsError: names or shapes are not this network's.
    """
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder:
  """The half of a tokenizer that makes codes.

  Attributes:
    encode: (parameters, images [b, h, w, 3] in [-1, 1]) -> codes [b, k, e].
    params: parameters that it reads, or their shapes.
    num_tokens: k.
    token_dim: e.
    image_size: side of the images, or (height, width).
    positions: order of the codes: '1d' in a sequence, '2d' in a square grid, or
      '16x24' in one of so many rows and columns.
  """

  encode: Callable[[PyTree, Float[Array, 'b h w 3']], Float[Array, 'b k e']]
  params: PyTree
  num_tokens: int
  token_dim: int
  image_size: sizes.Size
  positions: str = '1d'


def check_options(
  name: str,
  *,
  least: int = 1,
  dtype: str = 'float32',
  attention: str = 'auto',
  **numbers: int,
) -> None:
  """UserError for an unknown choice or a number below `least`."""
  for option, choice, choices in (
    ('dtype', dtype, layers.DTYPES),
    ('attention', attention, layers.ATTENTIONS),
  ):
    if choice not in choices:
      raise errors.UserError(
        f'{name}: {option}={choice!r}; wanted one of {", ".join(choices)}'
      )
  for option, value in numbers.items():
    if value < least:
      raise errors.UserError(
        f'{name}: {option}={value}; wanted {least} or more'
      )
