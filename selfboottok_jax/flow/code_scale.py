"""Scales codes to unit deviation, as a generator models them, and back."""

from jaxtyping import Array, Float, PyTree


def normalise(
  codes: Float[Array, 'b k e'], statistics: PyTree
) -> Float[Array, 'b k e']:
  """(codes - mean) / std, with 'mean' [e] and 'std' [e] of `statistics`."""
  return (codes - statistics['mean'][None, None]) / statistics['std'][
    None, None
  ]


def denormalise(
  x: Float[Array, 'b k e'], statistics: PyTree
) -> Float[Array, 'b k e']:
  """Inverse of `normalise`."""
  return x * statistics['std'][None, None] + statistics['mean'][None, None]
