"""Probability paths x_t = alpha(t) data + sigma(t) noise, t = 0 data.

With them go the distributions of training times on a path, and the scale of
what walks along it: codes of unit deviation, like the noise.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A time for each sample, or one for all of them.
Time: TypeAlias = Float[Array, ' b'] | Float[Array, '']
Coefficient: TypeAlias = Callable[[Time], Time]
Velocity: TypeAlias = Callable[
  [Float[Array, 'b ...'], Float[Array, ' b']], Array
]


@dataclasses.dataclass(frozen=True)
class Path:
  """A path by its two coefficients and their derivatives in t.

  Attributes:
    alpha: coefficient of the data; 1 at t = 0.
    sigma: coefficient of the noise; 0 at t = 0.
    d_alpha: derivative of `alpha`.
    d_sigma: derivative of `sigma`.
    time_at: inverse of t -> log(sigma / alpha), for any real number.
    min_time: smallest t at which the velocity is finite, the lower end of
      training times; 0 when it is finite everywhere.
  """

  alpha: Coefficient
  sigma: Coefficient
  d_alpha: Coefficient
  d_sigma: Coefficient
  time_at: Coefficient
  min_time: float = 0.0

  def interpolate(
    self, x: Float[Array, 'b ...'], noise: Float[Array, 'b ...'], t: Time
  ) -> Float[Array, 'b ...']:
    """The state x_t = alpha x + sigma noise between data `x` and `noise`."""
    return align(self.alpha(t), x) * x + align(self.sigma(t), x) * noise

  def velocity(
    self, x: Float[Array, 'b ...'], noise: Float[Array, 'b ...'], t: Time
  ) -> Float[Array, 'b ...']:
    """The target alpha' x + sigma' noise; noise - x on the linear path."""
    return align(self.d_alpha(t), x) * x + align(self.d_sigma(t), x) * noise

  def noise_from_velocity(
    self, v: Float[Array, 'b ...'], x: Float[Array, 'b ...'], t: Time
  ) -> Float[Array, 'b ...']:
    """The noise that velocity `v` at state `x` implies."""
    ahead = align(self.alpha(t), x) * v - align(self.d_alpha(t), x) * x
    return ahead / align(self.determinant(t), x)

  def data_from_velocity(
    self, v: Float[Array, 'b ...'], x: Float[Array, 'b ...'], t: Time
  ) -> Float[Array, 'b ...']:
    """The data that velocity `v` at state `x` implies."""
    behind = align(self.d_sigma(t), x) * x - align(self.sigma(t), x) * v
    return behind / align(self.determinant(t), x)

  def score_from_velocity(
    self, v: Float[Array, 'b ...'], x: Float[Array, 'b ...'], t: Time
  ) -> Float[Array, 'b ...']:
    """The score -noise / sigma that `v` at `x` implies; needs t > 0.

    Dividing by alpha' instead, as is often written, fails at the data end of
    the cosine path, where alpha' = 0.
    """
    return -self.noise_from_velocity(v, x, t) / align(self.sigma(t), x)

  def determinant(self, t: Time) -> Time:
    """Returns the determinant of the map (data, noise) -> (state, velocity)."""
    return self.alpha(t) * self.d_sigma(t) - self.d_alpha(t) * self.sigma(t)


def align(t: Time, x: Float[Array, 'b ...']) -> Float[Array, '...']:
  """Appends axes of length 1 to `t` until it multiplies `x` [b, ...].

  Times have one axis or none: any other would meet the wrong axis of `x`.
  """
  chex.assert_rank(t, {0, 1})
  return jnp.reshape(t, t.shape[:1] + (1,) * (x.ndim - t.ndim))


_HALF_PI = math.pi / 2
# Noise rates at the data and at the noise end of the variance-preserving path.
_VP_MIN, _VP_MAX = 0.1, 20.0


def _vp_log_alpha(t: Time) -> Time:
  return -0.25 * t**2 * (_VP_MAX - _VP_MIN) - 0.5 * t * _VP_MIN


def _vp_half_rate(t: Time) -> Time:
  return 0.5 * t * (_VP_MAX - _VP_MIN) + 0.5 * _VP_MIN


def _vp_alpha(t: Time) -> Time:
  return jnp.exp(_vp_log_alpha(t))


def _vp_sigma(t: Time) -> Time:
  # 1 - exp would lose half the digits near the data.
  return jnp.sqrt(-jnp.expm1(2 * _vp_log_alpha(t)))


def _vp_time_at(log_ratio: Time) -> Time:
  # alpha^2 = 1 / (1 + ratio^2); then a quadratic in t.
  log_alpha = -0.5 * jax.nn.softplus(2 * log_ratio)
  a, b = 0.25 * (_VP_MAX - _VP_MIN), 0.5 * _VP_MIN
  # The root's form without a difference of nearly equal numbers near t = 0.
  return -2 * log_alpha / (b + jnp.sqrt(b**2 - 4 * a * log_alpha))


PATHS = {
  'linear': Path(
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -jnp.ones_like(t),
    d_sigma=jnp.ones_like,
    time_at=jax.nn.sigmoid,
  ),
  'cosine': Path(
    alpha=lambda t: jnp.cos(_HALF_PI * t),
    sigma=lambda t: jnp.sin(_HALF_PI * t),
    d_alpha=lambda t: -_HALF_PI * jnp.sin(_HALF_PI * t),
    d_sigma=lambda t: _HALF_PI * jnp.cos(_HALF_PI * t),
    time_at=lambda log_ratio: jnp.arctan(jnp.exp(log_ratio)) / _HALF_PI,
  ),
  'vp': Path(
    alpha=_vp_alpha,
    sigma=_vp_sigma,
    d_alpha=lambda t: -_vp_half_rate(t) * _vp_alpha(t),
    d_sigma=lambda t: _vp_half_rate(t) * _vp_alpha(t) ** 2 / _vp_sigma(t),
    time_at=_vp_time_at,
    min_time=1e-5,  # sigma grows like sqrt(t): its derivative is infinite at 0
  ),
}


def uniform(rng: Any, count: int, path: Path) -> Float[Array, ' {count}']:
  """Draws times uniformly from [path.min_time, 1)."""
  return jax.random.uniform(rng, (count,), minval=path.min_time)


def logit_normal(rng: Any, count: int, path: Path) -> Float[Array, ' {count}']:
  """Draws times at which log(sigma / alpha) is standard normal.

  On the linear path the logit of t is normal (Esser et al., 2024).
  """
  draws = jax.random.normal(rng, (count,))
  # Far draws may round to 0, where the velocity of some paths is infinite.
  return jnp.maximum(path.time_at(draws), path.min_time)


TIMES: dict[str, Callable[..., Float[Array, ' b']]] = {
  'uniform': uniform,
  'logit_normal': logit_normal,
}


def normalise_codes(
  codes: Float[Array, 'b k e'], statistics: Mapping[str, Float[Any, ' e']]
) -> Float[Array, 'b k e']:
  """Computes (codes - mean) / std with the 'mean' and 'std' of `statistics`."""
  mean, std = (statistics[key][None, None] for key in ('mean', 'std'))
  return (codes - mean) / std


def denormalise_codes(
  x: Float[Array, 'b k e'], statistics: Mapping[str, Float[Any, ' e']]
) -> Float[Array, 'b k e']:
  """Inverse of `normalise_codes`."""
  mean, std = (statistics[key][None, None] for key in ('mean', 'std'))
  return x * std + mean
