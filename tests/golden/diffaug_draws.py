"""Recorded draws of DiffAug as ours."""

import jax.numpy as jnp
import numpy as np

from selfboottok_jax.objectives import diffaug


def read(arrays, prefix) -> diffaug.Draws:
  """The draws whose names begin with `prefix`."""

  def pair(rows, columns):
    both = (arrays[prefix + name] for name in (rows, columns))
    return jnp.asarray(np.stack(list(both), axis=1))

  return diffaug.Draws(
    *(
      jnp.asarray(arrays[prefix + name])
      for name in ('coin', 'brightness', 'saturation', 'contrast')
    ),
    shift=pair('tx', 'ty'),
    centre=pair('ox', 'oy'),
  )
