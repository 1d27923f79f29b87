"""What a frozen network promises to those who learn from it.

Parameters travel as an argument of the call, never inside a closure, so that
a jitted step can shard them and no checkpoint holds them.
"""

from typing import Any, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Array, Float


@flax.struct.dataclass
class Features:
  """What a network sees in a batch of images.

  Attributes:
    patches: Float[Array, 'b n d'], a vector per patch in raster order.
    cls: Float[Array, 'b e'], one vector per image, of its own width; None
      where there is none.
  """

  # Any: a pytree also carries shapes, specs or None in place of arrays.
  patches: Any
  cls: Any = None


@runtime_checkable
class FeatureNetwork(Protocol):
  """A frozen teacher: images in [-1, 1] to features.

  Attributes:
    name: what reports call it, e.g. 'mobilenet_v2'.
    params: its parameters, {} when it has none.
    dim: width of a patch vector.
  """

  name: str
  params: Any
  dim: int

  def __call__(self, params: Any, images: Float[Array, 'b h w 3']) -> Features:
    """Features of images in [-1, 1]."""
    ...

  def grid(self, image_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of a square image."""
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
