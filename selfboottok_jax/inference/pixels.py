"""Images as the bytes that files and metrics are made of."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from selfboottok_jax import errors

# Added to a level before its fraction is dropped.
ROUNDINGS = {'truncate': 0.0, 'round': 0.5}


def to_uint8(
  x: Float[Array, '*b h w c'] | Float[np.ndarray, '*b h w c'],
  rounding: str = 'truncate',
) -> UInt8[Array, '*b h w c']:
  """Quantises images in [-1, 1]: clamp((x + 1) / 2, 0, 1) * 255 to uint8.

  'truncate' drops the fraction; 'round' goes to the nearest level, halves up
  (ADM's clamp(127.5 x + 128)). Truncation lies half a level low on average,
  and takes some levels one down when an image went from uint8 to float and
  back, which 'round' never does.
  """
  if rounding not in ROUNDINGS:
    raise errors.UserError(
      f'unknown rounding {rounding!r}; choose one of {", ".join(ROUNDINGS)}'
    )
  x = jnp.asarray(x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  levels = jnp.clip((x + 1) / 2, 0.0, 1.0) * 255
  return jnp.floor(levels + ROUNDINGS[rounding]).astype(jnp.uint8)
