"""Decodes pictures as people have them: bytes of a file to RGB."""

import dataclasses
import functools
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, features

from selfboottok_jax import errors

Pixels = UInt8[np.ndarray, 'h w 3']

_ALWAYS = {
  '.bmp', '.dib', '.gif', '.j2k', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg',
  '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.tga', '.tif', '.tiff', '.webp',
}  # fmt: skip
_AVIF = {'.avif', '.avifs'}
_HEIF = {'.heic', '.heif', '.hif'}
# Files that are pictures, whether or not this machine can read them.
PICTURES = frozenset(_ALWAYS | _AVIF | _HEIF)
# What Pillow raises on damaged files, by format.
_DECODE_ERRORS = (
  OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError,
  OverflowError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x112
# The turns and mirrors that undo an EXIF orientation.
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# The orientation whose turn undoes that of another; most undo themselves.
_INVERSE = {6: 8, 8: 6}
# Those of photographs. Pillow knows others that start programs, as EPS does.
_FORMATS = (
  'AVIF', 'BMP', 'DIB', 'GIF', 'HEIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM',
  'TGA', 'TIFF', 'WEBP',
)  # fmt: skip
_PNG = b'\x89PNG\r\n\x1a\n'
# Chunks of a PNG that say nothing about its pixels' values, and may be large.
_PNG_TEXTS = (b'tEXt', b'zTXt', b'iTXt', b'iCCP')
# Those that do.
_PNG_PIXELS = (b'IHDR', b'PLTE', b'tRNS', b'IDAT')
# A file whose download was cut off is padded with zeros by some programs.
_PADDING = 512


class PictureError(errors.DataError):
  """A picture that cannot be decoded.

  Attributes:
    reason: what is wrong with it, without its name.
  """

  def __init__(self, name: str, reason: str):
    """Names the picture and the reason."""
    super().__init__(
      f'{name} is no image that can be read: {reason}; replace it, take it '
      'out, or set data.bad=skip'
    )
    self.name, self.reason = name, reason

  def __reduce__(self) -> tuple[Any, ...]:
    """Pickles, as an error of a worker process does on its way."""
    return type(self), (self.name, self.reason)


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of decoding; the section `data` of a configuration has them.

  Attributes:
    exif: whether to turn a picture upright as its EXIF data say. ADM's
      protocol, and what torchvision's users get, leaves it as it is stored.
    max_pixels: pictures with more are refused: they take 3 bytes a pixel.
  """

  exif: bool = True
  max_pixels: int = 200_000_000


def suffixes() -> frozenset[str]:
  """Returns the endings of files that are pictures, as '.png'.

  AVIF where Pillow was built with it; HEIC where `pillow_heif` is installed.
  """
  found = set(_ALWAYS)
  if features.check('avif'):
    found |= _AVIF
  if _read_heif():
    found |= _HEIF
  return frozenset(found)


def decode(data: bytes, name: str, options: Options) -> Pixels:
  """Returns what `open_rgb` does, as an array."""
  return np.asarray(open_rgb(data, name, options))


def open_rgb(data: bytes, name: str, options: Options) -> Image.Image:
  """Decodes a picture to RGB, whatever its mode; of an animation the first.

  Transparent parts are white.

  Args:
    data: the file.
    name: its name, for errors.
    options: see there.

  Raises:
    PictureError: it is damaged, no picture, or too large.
  """
  # Pillow's own limit warns at 89 million pixels and refuses at 179 million,
  # which is less than ours; a warning in the middle of a training helps nobody.
  Image.MAX_IMAGE_PIXELS = None
  try:
    if data.startswith(_PNG):
      _check_png(data)
    return _decode(data, options)
  except _Refused as error:
    raise PictureError(name, str(error)) from None
  except _DECODE_ERRORS as error:
    if data.startswith(_PNG) and (plain := _without_texts(data)) != data:
      # Pillow refuses long texts, as a workflow that some programs store, and
      # damaged ones. They are no part of the picture.
      return open_rgb(plain, name, options)
    raise PictureError(name, _reason(data, error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
  """The formats that Pillow can read here, of those of photographs."""
  _read_heif()
  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


class _Refused(Exception):  # noqa: N818 - its text is the reason.
  """A picture that could be decoded but will not be."""


def _decode(data: bytes, options: Options) -> Image.Image:
  with Image.open(io.BytesIO(data), formats=_formats()) as image:
    pixels = image.width * image.height
    if pixels > options.max_pixels:
      raise _Refused(
        f'{image.width} x {image.height} are {pixels / 1e6:.0f} million pixels,'
        f' over data.max_pixels={options.max_pixels}'
      )
    # Known before the pixels are read, and lost afterwards.
    bits, stored = _bits(image), _orientation(image)
    image.load()
    # Pillow turns a TIFF when it reads the pixels, and then drops the tag.
    left = _orientation(image) if image.format == 'TIFF' else stored
    turn = _UPRIGHT.get(left) if options.exif else None
    if not options.exif and left != stored:
      turn = _UPRIGHT.get(_INVERSE.get(stored, stored))
    if image.format == 'JPEG' and _is_padded(data):
      raise _Refused('it is cut short, and filled up with zeros')
    rgb = to_rgb(image, bits)
    if turn is not None:
      rgb = rgb.transpose(turn)
    return rgb


def _reason(data: bytes, error: BaseException) -> str:
  """Why a file could not be decoded, in a user's words."""
  if not data:
    return 'the file is empty'
  if isinstance(error, Image.UnidentifiedImageError):
    start = data[:24].decode('ascii', 'replace').split('\n')[0]
    printable = ''.join(c if c.isprintable() else '.' for c in start)
    return f'it is of no known format, and begins with {printable!r}'
  text = ' '.join(str(error).split()) or type(error).__name__
  return f'{text} ({len(data):,} bytes)'


def _is_padded(data: bytes) -> bool:
  """True for a JPEG that ends in zeros where its end should be.

  libjpeg reads zeros without complaint, and paints what is missing grey.
  """
  kept = data.rstrip(b'\0')
  return len(data) - len(kept) >= _PADDING and not kept.endswith(b'\xff\xd9')


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
  # To look for it takes time, and Pillow notes what a JPEG has when opening it.
  if image.format == 'JPEG' and not {'exif', 'xmp'} & image.info.keys():
    return 1
  try:
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) else 1
  # Damaged EXIF data are no damage to the picture.
  except (*_DECODE_ERRORS, AttributeError, ZeroDivisionError, UserWarning):
    return 1


def is_turned(data: bytes) -> bool:
  """True for a picture that its EXIF data turn or mirror."""
  with Image.open(io.BytesIO(data), formats=_formats()) as image:
    return _orientation(image) in _UPRIGHT


def _bits(image: Image.Image) -> int:
  """Bits of a stored sample that Pillow widens to 8, or narrows; else 8."""
  tile = getattr(image, 'tile', None)
  if not tile:
    return 8
  args = tile[0].args
  raw = args if isinstance(args, str) else args and args[0]
  if raw == '1':
    return 1
  kind, _, depth = str(raw).partition(';')
  digits = ''.join(c for c in depth if c.isdigit())
  return int(digits) if kind in ('L', 'RGB', 'I') and digits else 8


def to_rgb(image: Image.Image, bits: int = 8) -> Image.Image:
  """Converts any mode to RGB.

  Transparent parts become white, wider samples are scaled to 8 bits, and floats
  beyond [0, 1] by their own range.

  Args:
    image: of any mode that Pillow has.
    bits: of a sample in the file, where Pillow widened or narrowed it.
  """
  if image.mode.startswith('I') or image.mode == 'F':
    return _from_wide(image)
  if image.mode == 'LAB':
    lab, rgb = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode='RGB')
    assert converted is not None
    return converted
  if image.mode == 'CMYK' and image.format == 'JPEG':
    # Pillow inverts all, as Adobe stores them. Files without Adobe's mark are
    # stored as they are.
    if 'adobe' not in image.info:
      image = Image.fromarray(255 - np.asarray(image), 'CMYK')
    return image.convert('RGB')
  key = image.info.get('transparency')
  if key is not None and image.mode in ('1', 'L', 'RGB'):
    return _paint_key(image, key, bits)
  if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or key is not None:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  # It would be copied else.
  return image if image.mode == 'RGB' else image.convert('RGB')


def _paint_key(image: Image.Image, key: Any, bits: int) -> Image.Image:
  """Paints the one transparent colour of a PNG or GIF white."""
  rgb = np.array(image.convert('RGB'))
  levels = np.atleast_1d(np.asarray(key, np.int64))
  # The colour has the file's depth, the pixels have 8 bits.
  if bits > 8:
    levels = levels >> (bits - 8)
  elif bits < 8:
    levels = levels * 255 // (2**bits - 1)
  rgb[np.all(rgb == levels, axis=-1)] = 255
  return Image.fromarray(rgb)


def _from_wide(image: Image.Image) -> Image.Image:
  """Scales grey levels of 16 or 32 bits, or floats, to 8 bits."""
  values = np.asarray(image).astype(np.float64)
  key = image.info.get('transparency')
  transparent = None if key is None else values == key
  finite = values[np.isfinite(values)]
  low = float(np.min(finite)) if finite.size else 0.0
  high = float(np.max(finite)) if finite.size else 0.0
  if image.mode == 'F':
    # Light from 0 to 1 by custom; anything else, as heights, by its own range.
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    levels = np.round((values - low) / max(high - low, 1e-300) * 255)
  elif image.mode == 'I' and image.format != 'PNG' and low >= 0 and high < 256:
    levels = values
  elif low >= 0 and high < 2**16:
    # 16-bit PNGs open as 'I' or 'I;16' by Pillow's version. The high byte, as
    # Pillow itself takes of 16-bit colours.
    levels = np.floor(values / 256)
  else:
    levels = np.round((values - low) / max(high - low, 1.0) * 255)
  grey = np.nan_to_num(levels, nan=0.0, posinf=255.0, neginf=0.0)
  grey = grey.clip(0, 255).astype(np.uint8)
  if transparent is not None:
    grey[transparent] = 255
  return Image.fromarray(grey).convert('RGB')


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
  """The chunks of a PNG: kind, start and end in the file."""
  at = len(_PNG)
  while at + 12 <= len(data):
    (length,) = struct.unpack_from('>I', data, at)
    yield data[at + 4 : at + 8], at, at + 12 + length
    at += 12 + length


def _check_png(data: bytes) -> None:
  """Compares checksums, which Pillow does not for the pixels."""
  view = memoryview(data)
  for kind, start, end in _chunks(data):
    # A chunk that is cut short is found when it is decoded.
    if kind in _PNG_PIXELS and end <= len(data):
      (wanted,) = struct.unpack_from('>I', data, end - 4)
      if zlib.crc32(view[start + 4 : end - 4]) != wanted:
        raise _Refused(f'the checksum of its {kind.decode()} chunk is wrong')


def _without_texts(data: bytes) -> bytes:
  """Leaves texts and colour profiles out of a PNG."""
  return data[: len(_PNG)] + b''.join(
    data[start:end]
    for kind, start, end in _chunks(data)
    if kind not in _PNG_TEXTS
  )


def _read_heif() -> bool:
  """Lets Pillow read HEIC files, if `pillow_heif` is installed."""
  global _heif
  if _heif is None:
    try:
      import pillow_heif
    except ImportError:
      _heif = False
    else:
      pillow_heif.register_heif_opener()
      _heif = True
  return _heif


_heif: bool | None = None
