"""A perceptual distance over any feature network."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.pretrained import contract

# Squared length below which a patch vector fades out instead of being
# stretched to unit length; keeps the gradient finite at zero.
_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureDistance:
  """Squared distance of unit-normalised patch features, mean over patches.

  Summed over channels, like a layer of LPIPS: between 0 (equal) and 4
  (opposite in every patch); for vectors of unit length 2 - 2 cosine.

  Attributes:
    network: whose features are compared; `params` are its parameters.
  """

  network: contract.FeatureNetwork

  @property
  def name(self) -> str:
    """The name of the network."""
    return self.network.name

  @property
  def params(self) -> Any:
    """The parameters of the network."""
    return self.network.params

  def __call__(
    self,
    params: Any,
    a: Float[Array, 'b h w 3'],
    b: Float[Array, 'b h w 3'],
  ) -> Float[Array, 'b']:
    """The distance of each pair of images in [-1, 1]."""
    from_a, from_b = (_unit(self.network(params, x).patches) for x in (a, b))
    return jnp.square(from_a - from_b).sum(axis=-1).mean(axis=-1)


def _unit(x: Float[Array, 'b n d']) -> Float[Array, 'b n d']:
  square = jnp.square(x).sum(axis=-1, keepdims=True)
  return x / jnp.sqrt(square + _FLOOR)
