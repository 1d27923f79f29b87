"""Distributions of the training times of a path."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.flow import path as path_lib


def uniform(
  rng: Any, count: int, path: path_lib.Path
) -> Float[Array, ' {count}']:
  """Uniform in [path.min_time, 1)."""
  return jax.random.uniform(rng, (count,), minval=path.min_time)


def logit_normal(
  rng: Any, count: int, path: path_lib.Path
) -> Float[Array, ' {count}']:
  """Times at which log(sigma / alpha) is standard normal.

  On the linear path the logit of t is normal (Esser et al., 2024).
  """
  draws = jax.random.normal(rng, (count,))
  return jnp.maximum(path.time_at(draws), path.min_time)


TIMES: dict[str, Callable[..., Float[Array, ' b']]] = {
  'uniform': uniform,
  'logit_normal': logit_normal,
}
