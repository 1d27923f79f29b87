"""Outlines and textures of the built-in scenes, as functions of the plane."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Plane = Float[np.ndarray, '...']


# Shapes: signed distance to the outline, negative inside, about 1 in radius.


def _disc(x: Plane, y: Plane) -> Plane:
  return np.hypot(x, y) - 0.85


def _square(x: Plane, y: Plane) -> Plane:
  return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x: Plane, y: Plane) -> Plane:
  side = 0.866 * np.abs(x) + 0.5 * y
  return np.maximum(side, -y) - 0.52


def _star(x: Plane, y: Plane) -> Plane:
  """Five points: one edge, folded into a tenth of the circle."""
  radius, sector = np.hypot(x, y), 2 * np.pi / 5
  angle = np.arctan2(x, y)
  angle = np.abs(angle - sector * np.round(angle / sector))
  tip = np.array([1.05, 0.0])
  dent = 0.44 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
  normal = np.array([dent[1] - tip[1], tip[0] - dent[0]])
  normal /= np.linalg.norm(normal)
  nx, ny = map(float, normal)
  along, across = radius * np.cos(angle), radius * np.sin(angle)
  return nx * (along - float(tip[0])) + ny * across


def _ring(x: Plane, y: Plane) -> Plane:
  return np.abs(np.hypot(x, y) - 0.69) - 0.2


def _cross(x: Plane, y: Plane) -> Plane:
  x, y = np.abs(x), np.abs(y)
  return np.maximum(np.minimum(x, y) - 0.27, np.maximum(x, y) - 0.92)


def _crescent(x: Plane, y: Plane) -> Plane:
  x = x - 0.15
  return np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.5, y))


def _heart(x: Plane, y: Plane) -> Plane:
  """A square on its corner with a disc on each upper side."""
  s = 0.53
  y = y + 0.12
  x = np.abs(x)
  u, v = (x + y) * 0.7071, (y - x) * 0.7071
  square = np.maximum(np.abs(u), np.abs(v)) - s
  return np.minimum(square, np.hypot(u - s, v) - s)


def _bars(x: Plane, y: Plane) -> Plane:
  x, y = np.abs(x), np.abs(y)
  return np.maximum(x - 0.85, np.minimum(y, np.abs(y - 0.62)) - 0.18)


def _hourglass(x: Plane, y: Plane) -> Plane:
  x, y = np.abs(x), np.abs(y)
  return np.maximum(y - 0.88, 0.78 * (x - 0.06) - 0.62 * y)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
  'disc': _disc,
  'square': _square,
  'triangle': _triangle,
  'star': _star,
  'ring': _ring,
  'cross': _cross,
  'crescent': _crescent,
  'heart': _heart,
  'bars': _bars,
  'hourglass': _hourglass,
}


# Textures: about -1..1 in coordinates of one period; edges soft, so that they
# stay below what the pixels can carry.


def _plain(u: Plane, v: Plane) -> Plane:
  del v
  return np.zeros_like(u)


def _stripes(u: Plane, v: Plane) -> Plane:
  del v
  return np.clip(1.5 * np.sin(2 * np.pi * u), -1, 1)


def _checks(u: Plane, v: Plane) -> Plane:
  return np.clip(
    2.5 * np.sin(np.pi * u) * np.sin(np.pi * v),
    -1,
    1,
  )


def _dots(u: Plane, v: Plane) -> Plane:
  wave = np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v)
  return np.clip(1.5 * wave - 0.8, -1, 1)


TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
  'stripes': _stripes,
  'checks': _checks,
  'dots': _dots,
  'plain': _plain,
}
