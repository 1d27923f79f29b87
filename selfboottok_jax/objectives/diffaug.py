"""DiffAug: differentiable augmentation of what a discriminator sees.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training",
2020. Real and fake images go through it alike, and the gradient to the fake
ones comes back through it.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Longest shift, as a share of the side.
SHIFT = 0.125


@dataclasses.dataclass(frozen=True)
class Strength:
  """Strength of the augmentation of a batch.

  Attributes:
    probability: of each of colour, translation and cutout: one coin for the
      whole batch.
    hole: side of the square that is cut out, as a share of the image's.
  """

  probability: float = 0.5
  hole: float = 0.2


WEAK, STRONG = Strength(), Strength(1.0, 0.5)


@flax.struct.dataclass
class Draws:
  """Random numbers of one call.

  Attributes:
    coins: Float[Array, '3'] in [0, 1), of colour, translation and cutout; a
      change acts where its coin is at most the probability.
    brightness: Float[Array, 'b'] in [0, 1), as are the next two.
    saturation: Float[Array, 'b'], of the distance to the mean over colours.
    contrast: Float[Array, 'b'], of the distance to the image's mean.
    shift: Int[Array, 'b 2'], rows and columns to move by, up and to the left.
    centre: Int[Array, 'b 2'], row and column of the hole's middle.
  """

  # Any: a pytree also carries batches of these, under vmap.
  coins: Any
  brightness: Any
  saturation: Any
  contrast: Any
  shift: Any
  centre: Any


def draw(key: Any, shape: tuple[int, ...], strength: Strength) -> Draws:
  """Draws random numbers for images of shape (b, h, w, ...)."""
  b, *size = shape[:3]
  colour_key, coin_key, *keys = jax.random.split(key, 6)
  brightness, saturation, contrast = jax.random.uniform(colour_key, (3, b))
  shifts, centres = [], []
  for shift_key, centre_key, side in zip(keys[:2], keys[2:], size, strict=True):
    most, hole = (
      round_half_up(side * SHIFT),
      round_half_up(side * strength.hole),
    )
    shifts.append(jax.random.randint(shift_key, (b,), -most, most + 1))
    # The middle of an even number of pixels is the one behind it.
    end = side + 1 - hole % 2
    centres.append(jax.random.randint(centre_key, (b,), 0, end))
  return Draws(
    coins=jax.random.uniform(coin_key, (3,)),
    brightness=brightness,
    saturation=saturation,
    contrast=contrast,
    shift=jnp.stack(shifts, axis=1),
    centre=jnp.stack(centres, axis=1),
  )


def augment(
  images: Float[Array, 'b h w c'], draws: Draws, strength: Strength
) -> Float[Array, 'b h w c']:
  """Changes colours, shifts and cuts holes, each only if its coin allows.

  Args:
    images: in [-1, 1], where 0 is grey: what is moved in or cut out is 0. The
      result may leave the range.
    draws: from `draw`, for this shape and strength.
    strength: WEAK or STRONG, or another.

  Returns:
    Images of the same shape and type.
  """
  acts = draws.coins <= strength.probability
  for coin, change in zip(
    acts,
    (_recolour, _move, lambda x, d: _cut(x, d, strength.hole)),
    strict=True,
  ):
    # A traced coin cannot branch in Python, so every change is computed.
    images = jnp.where(coin, change(images, draws), images)
  return images


def round_half_up(x: float) -> int:
  """Rounds to the nearest integer, halves up."""
  # Python's round takes halves to the even side; SoftVQ's code does not.
  return int(x + 0.5)


def _recolour(
  x: Float[Array, 'b h w c'], draws: Draws
) -> Float[Array, 'b h w c']:
  def per_image(factor: Float[Array, ' b']) -> Float[Array, 'b 1 1 1']:
    return factor.astype(x.dtype)[:, None, None, None]

  x = x + per_image(draws.brightness - 0.5)
  grey = jnp.mean(x, axis=3, keepdims=True)
  x = (x - grey) * per_image(2 * draws.saturation) + grey
  mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  return (x - mean) * per_image(draws.contrast + 0.5) + mean


def _move(x: Float[Array, 'b h w c'], draws: Draws) -> Float[Array, 'b h w c']:
  """Moves row h + shift to row h, columns alike; fills the rest with 0."""
  _, h, w, c = x.shape
  most = [round_half_up(side * SHIFT) for side in (h, w)]
  # Padded by the longest shift, so that no slice is clamped at a border.
  padded = jnp.pad(x, ((0, 0), *((m, m) for m in most), (0, 0)))

  # Shifts differ by image and are traced: a slice of fixed size, moved, keeps
  # shapes static.
  def one(image: Array, shift: Array) -> Array:
    start = [shift[axis] + most[axis] for axis in (0, 1)]
    return jax.lax.dynamic_slice(image, (*start, 0), (h, w, c))

  return jax.vmap(one)(padded, draws.shift)


def _cut(
  x: Float[Array, 'b h w c'], draws: Draws, share: float
) -> Float[Array, 'b h w c']:
  inside = []
  for axis, side in enumerate(x.shape[1:3]):
    hole = round_half_up(side * share)
    first = draws.centre[:, axis, None] - hole // 2
    at = jnp.arange(side)[None]
    inside.append((at >= first) & (at < first + hole))
  rows, columns = inside
  outside = ~(rows[:, :, None] & columns[:, None, :])
  return x * outside.astype(x.dtype)[..., None]
