"""Built-in scenes: a textured shape on a textured background.

Ten classes need the whole silhouette, the textures need detail, and nothing
needs a download. A scene is a pure function of (split, index); its geometry is
in units of the picture's shorter side, so it is the same scene at every size.
Longer sides show more of the background.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from selfboottok_jax import sizes

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


Colour = Float[np.ndarray, '3']

_VERSION = 2  # raise it when a scene changes: it enters the fingerprint
_LENGTHS = {'train': 50_000, 'val': 2_000}
# First half of the random generator's key: the splits share no scene.
_STREAMS = {'train': 0x7472, 'val': 0x7661}
_DRAWS = 32
_OUTLINES = tuple(SHAPES.values())


@dataclasses.dataclass(frozen=True)
class Surface:
  """Colour and texture of the shape or of the background.

  Attributes:
    near: RGB in [0, 1] at one side of the gradient.
    far: RGB at the other side.
    direction: of the gradient, radians.
    texture: a key of `TEXTURES`.
    period: of the texture, in picture widths.
    angle: of the texture, radians.
    strength: how far the texture lightens and darkens, as a share.
  """

  near: Colour
  far: Colour
  direction: float
  texture: str
  period: float
  angle: float
  strength: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """Everything about a picture but its size; lengths in half widths.

  Those are of a square. In a rectangle the centre moves over the whole longer
  side in the way it moves over a side of the square.
  """

  label: int
  center: tuple[float, float]
  radius: float
  angle: float
  shadow: tuple[float, float]
  shape: Surface
  background: Surface


# How far from the middle of a square a shape may come, in half widths.
_REACH = 0.95


def make_scene(split: str, index: int) -> Scene:
  """Draws the scene of an index: all of its numbers in one call."""
  generator = np.random.Philox(key=[_STREAMS[split], index])
  draws = iter(np.random.Generator(generator).random(_DRAWS).tolist())
  label = int(len(SHAPES) * next(draws))
  radius = 0.56 + 0.24 * next(draws)
  reach = _REACH - radius
  center = tuple(reach * (2 * next(draws) - 1) for _ in range(2))
  angle = 2 * np.pi * next(draws)
  fall = 2 * np.pi * next(draws)
  shadow = (0.13 * float(np.cos(fall)), 0.13 * float(np.sin(fall)))
  # One of the two is light and the other dark, so that the outline always
  # shows, in hues at least 80 degrees apart.
  hue, light = next(draws), next(draws) < 0.5
  other = hue + 0.22 + 0.56 * next(draws)
  shape = _draw_surface(draws, hue, light, saturation=0.85)
  background = _draw_surface(draws, other, not light, saturation=0.65)
  return Scene(label, center, radius, angle, shadow, shape, background)


def _draw_surface(
  draws: Iterator[float], hue: float, light: bool, saturation: float
) -> Surface:
  value = 0.84 + 0.13 * next(draws) if light else 0.34 + 0.2 * next(draws)
  saturation *= (0.7 if light else 1.0) * (0.7 + 0.45 * next(draws))
  turn = 0.16 * (next(draws) - 0.5)
  step = 0.16 if light else 0.12
  return Surface(
    near=_colour(hue, saturation, value + 0.3 * step),
    far=_colour(hue + turn, saturation, value - step),
    direction=2 * np.pi * next(draws),
    texture=tuple(TEXTURES)[int(len(TEXTURES) * next(draws))],
    # 2.5 to 6 pixels at 32x32.
    period=(2.5 + 3.5 * next(draws)) / 32,
    angle=np.pi * next(draws),
    strength=0.05 + 0.07 * next(draws),
  )


def _colour(hue: float, saturation: float, value: float) -> Colour:
  """Hue in turns to RGB, by three shifted cosines."""
  phase = 2 * np.pi * (hue - np.arange(3) / 3)
  wheel = 0.5 + 0.5 * np.cos(phase)
  return (value * (1 - saturation * (1 - wheel))).astype(np.float32)


def render(scene: Scene, size: sizes.Size) -> UInt8[np.ndarray, 'h w 3']:
  """Draws a scene, anti-aliased.

  Small pictures are drawn at twice their size and averaged, which textures of
  a few pixels need; edges are soft over a pixel at any size.
  """
  height, width = sizes.pair(size)
  shorter = min(height, width)
  finer = 2 if shorter <= 64 else 1
  pixel = 2 / (shorter * finer)
  # Half the length of each side, in half shorter sides: 1 in a square.
  reach = width / shorter, height / shorter
  across, down = (
    (np.arange(side * finer, dtype=np.float32) + 0.5) * pixel - half
    for side, half in zip((width, height), reach, strict=True)
  )
  scene = _spread(scene, reach)
  x, y = np.meshgrid(across, -down)
  x, y = x.astype(np.float32), y.astype(np.float32)
  cover = np.clip(0.5 - _distance(scene, x, y) / pixel, 0, 1)
  moved = _distance(scene, x - scene.shadow[0], y - scene.shadow[1])
  shade = 1 - 0.4 * np.clip(0.5 - moved / 0.16, 0, 1)
  # Colours change from corner to corner, however far apart those are.
  extent = max(reach)
  back = _paint(scene.background, x, y, extent) * shade[..., None]
  shape = _paint(scene.shape, x, y, extent)
  image = back + cover[..., None] * (shape - back)
  if finer > 1:
    image = image.reshape(height, finer, width, finer, 3).mean((1, 3))
  return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8)


def _spread(scene: Scene, reach: tuple[float, float]) -> Scene:
  """Moves the centre over a picture of `reach`, half widths from its middle."""
  room = _REACH - scene.radius
  x, y = (
    place * (1 + (half - 1) / room)
    for place, half in zip(scene.center, reach, strict=True)
  )
  return dataclasses.replace(scene, center=(x, y))


def _distance(scene: Scene, x: Plane, y: Plane) -> Plane:
  """Signed distance to the scene's outline, in half widths."""
  c, s = float(np.cos(scene.angle)), float(np.sin(scene.angle))
  x, y = x - scene.center[0], y - scene.center[1]
  u = (c * x + s * y) / scene.radius
  v = (c * y - s * x) / scene.radius
  return _OUTLINES[scene.label](u, v) * scene.radius


def _paint(
  surface: Surface, x: Plane, y: Plane, extent: float
) -> Float[np.ndarray, '... 3']:
  """Colours of points that lie within `extent` of the middle on each axis."""
  c, s = float(np.cos(surface.direction)), float(np.sin(surface.direction))
  mix = 0.5 + 0.35 / extent * (c * x + s * y)
  c, s = float(np.cos(surface.angle)), float(np.sin(surface.angle))
  scale = 1 / (2 * surface.period)
  u, v = scale * (c * x + s * y), scale * (c * y - s * x)
  light = 1 + surface.strength * TEXTURES[surface.texture](u, v)
  colour = surface.near + mix[..., None] * (surface.far - surface.near)
  return colour * light[..., None]


class ProceduralSource:
  """The built-in scenes of a split, drawn when they are asked for.

  Attributes:
    class_names: names of the ten shapes.
    fingerprint: sha256 of version, split, length and size.
    max_scale: 1, as scenes already vary in scale and place, and enlarging
      them would blur their textures.
  """

  class_names = tuple(SHAPES)
  max_scale = 1.0

  def __init__(
    self, split: str, image_size: sizes.Size, length: int | None = None
  ):
    """Takes the pictures' size, and scenes to offer if not the usual number."""
    self._split = split
    self._size = image_size
    self._length = _LENGTHS[split] if length is None else length
    content = f'scenes {_VERSION} {split} {self._length} {image_size}'
    self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

  def __len__(self) -> int:
    """Number of scenes."""
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Draws a scene: {'image': uint8 [h, w, 3], 'label': int}."""
    if not 0 <= index < self._length:
      raise IndexError(index)
    scene = make_scene(self._split, index)
    return {'image': render(scene, self._size), 'label': scene.label}

  def __repr__(self) -> str:
    """Names the split and size, for logs."""
    return f'built-in scenes, {sizes.describe(self._size)} ({self._split})'
