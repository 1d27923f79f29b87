"""Image grids as uint8 arrays and PNG files."""

import io
import math
import os
import textwrap
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from selfboottok_jax import errors, files

_THUMBNAIL = 96  # Pixels: small images are enlarged to about this side.
_FONT_SIZE = 17
_LINE_SPACING = 5
_MARGIN = 10
_CAPTION_LETTERS = 18  # A caption's line is wrapped here.
_INK = (34, 34, 34)


def enlarge(
  images: UInt8[np.ndarray, 'm h w 3'], side: int = _THUMBNAIL
) -> UInt8[np.ndarray, 'm scaled_h scaled_w 3']:
  """Repeats pixels a whole number of times, to about `side` pixels.

  Nearest neighbour, so that every pixel seen is a pixel of the image. Images
  that are large enough stay as they are.
  """
  scale = max(1, round(side / max(images.shape[1:3])))
  return images.repeat(scale, axis=1).repeat(scale, axis=2)


def grid(
  images: UInt8[np.ndarray, 'm h w 3'],
  columns: int,
  pad: int = 2,
  background: int = 255,
) -> UInt8[np.ndarray, 'rows cols 3']:
  """Arranges images in reading order, `pad` background pixels apart.

  Cells that the last row lacks are background; there is no outer margin.
  """
  if not len(images) or columns < 1 or pad < 0:
    raise errors.UserError(
      f'A grid was asked of {len(images)} images in {columns} columns with '
      f'{pad} pixels between them; give at least one image and one column, '
      f'and no negative distance.'
    )
  count, height, width, _ = images.shape
  rows = math.ceil(count / columns)
  canvas = np.full(
    (rows * (height + pad) - pad, columns * (width + pad) - pad, 3),
    background,
    np.uint8,
  )
  for index, image in enumerate(images):
    row, column = divmod(index, columns)
    top, left = row * (height + pad), column * (width + pad)
    canvas[top : top + height, left : left + width] = image
  return canvas


def strip(
  images: UInt8[np.ndarray, 'm h w 3'], columns: int | None = None
) -> UInt8[np.ndarray, 'rows cols 3']:
  """Enlarges images to thumbnails, in one row or in `columns`."""
  return grid(enlarge(images), columns or max(1, len(images)), pad=4)


def comparison(
  rows: Mapping[str, UInt8[np.ndarray, '...']],
) -> UInt8[np.ndarray, 'height width 3']:
  """Draws a captioned row of thumbnails per label; columns share an image.

  Args:
    rows: label -> images [m, h, w, 3]; a label may have several lines, and
      long lines are wrapped.

  Raises:
    UserError: no rows, or rows of unequal shapes.
  """
  shapes = {label: images.shape for label, images in rows.items()}
  if len(set(shapes.values())) != 1:
    raise errors.UserError(
      f'A comparison needs at least one row, and as many images of one size in '
      f'each of them; the rows have the shapes {shapes}.'
    )
  font = ImageFont.load_default(_FONT_SIZE)
  measure = ImageDraw.Draw(Image.new('RGB', (1, 1)))
  captions = [_wrap(label) for label in rows]
  boxes = [
    measure.multiline_textbbox((0, 0), text, font, spacing=_LINE_SPACING)
    for text in captions
  ]
  gutter = math.ceil(max(box[2] for box in boxes)) + 2 * _MARGIN
  strips = [strip(images) for images in rows.values()]
  # Tall captions make their row taller, so that none runs into the next.
  heights = [
    max(len(images), math.ceil(box[3]))
    for images, box in zip(strips, boxes, strict=True)
  ]
  canvas = Image.new(
    'RGB',
    (
      gutter + strips[0].shape[1] + _MARGIN,
      sum(heights) + _MARGIN * (len(heights) + 1),
    ),
    'white',
  )
  draw = ImageDraw.Draw(canvas)
  top = _MARGIN
  for text, box, images, height in zip(
    captions, boxes, strips, heights, strict=True
  ):
    below = top + (height - (box[1] + box[3])) / 2
    draw.multiline_text(
      (_MARGIN, below), text, _INK, font, spacing=_LINE_SPACING
    )
    canvas.paste(
      Image.fromarray(images), (gutter, top + (height - len(images)) // 2)
    )
    top += height + _MARGIN
  return np.array(canvas)


def _wrap(label: str) -> str:
  return '\n'.join(
    textwrap.fill(line, _CAPTION_LETTERS) for line in label.splitlines()
  )


def png_bytes(image: UInt8[np.ndarray, 'h w 3']) -> bytes:
  """Encodes an image as the contents of a PNG file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def save_png(
  path: str | os.PathLike[str], image: UInt8[np.ndarray, 'h w 3']
) -> files.Path:
  """Writes a PNG file atomically, so no reader sees half of it."""
  return files.write_atomically(path, png_bytes(image))
