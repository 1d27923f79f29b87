"""A velocity field in closed form: Gaussian classes and their mixture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.flow import path as path_lib


@dataclasses.dataclass
class Field:
  """Class k has data N(mean[k], std[k]^2 I); `null` is the mixture by weight.

  With `seen` a list, each evaluation adds (state of the first `batch` rows, t,
  rows) to it, in order, under jit too.
  """

  mean: np.ndarray
  std: np.ndarray
  weight: np.ndarray
  null: int
  path: path_lib.Path
  seen: list | None = None
  batch: int = 0

  def __call__(self, x, t, labels):
    if self.seen is not None:
      rows = len(x)
      jax.debug.callback(
        lambda x, t: self.seen.append((np.array(x), float(t), rows)),
        x[: self.batch],
        t[0],
        ordered=True,
      )
    constants = [
      jnp.asarray(a, x.dtype) for a in (self.mean, self.std, self.weight)
    ]
    v, log = jax.vmap(functools.partial(self._class, x, t))(*constants)
    share = jnp.exp(log - jnp.max(log, axis=0, keepdims=True))
    share = share / jnp.sum(share, axis=0, keepdims=True)
    mixed = jnp.sum(v * jnp.expand_dims(share, range(2, v.ndim)), axis=0)
    own = v[jnp.clip(labels, 0, len(v) - 1), jnp.arange(len(x))]
    is_null = jnp.expand_dims(labels == self.null, range(1, x.ndim))
    return jnp.where(is_null, mixed, own)

  def _class(self, x, t, mean, std, weight):
    """Velocity of a class; its log share of the mixture up to a constant."""
    alpha, sigma = self.path.alpha(t), self.path.sigma(t)
    var = (alpha * std) ** 2 + sigma**2
    rest = x - path_lib.align(alpha, x) * mean[None]
    data = mean[None] + path_lib.align(alpha * std**2 / var, x) * rest
    noise = path_lib.align(sigma / var, x) * rest
    square = jnp.sum(rest**2, axis=tuple(range(1, x.ndim)))
    log = jnp.log(weight) - 0.5 * (x[0].size * jnp.log(var) + square / var)
    return self.path.velocity(data, noise, t), log


def from_fixture(fixture, path: path_lib.Path, **kwargs) -> Field:
  return Field(
    fixture.arrays['in.field_mean'],
    fixture.arrays['in.field_std'],
    fixture.arrays['in.field_w'],
    fixture.meta['null'],
    path,
    **kwargs,
  )
