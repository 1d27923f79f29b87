import io
import pathlib
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from selfboottok_jax import errors
from selfboottok_jax.data import pictures

RED = (200, 40, 40)


def gradient(height=24, width=30):
  y, x = np.mgrid[:height, :width]
  levels = [x * 255 // width, y * 255 // height, (x + y) % 256]
  return np.stack(levels, -1).astype(np.uint8)


def encode(image, kind='png', **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def decode(data, **options):
  return pictures.decode(data, 'a/b', pictures.Options(**options))


def chunk(kind, data):
  crc = zlib.crc32(kind + data)
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)


def raw_png(width, height, depth, colour, rows, extra=b''):
  fields = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
  body = chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', fields) + extra + body


@pytest.mark.parametrize(
  ('mode', 'suffix'),
  [('L', 'png'), ('P', 'png'), ('CMYK', 'jpeg'), ('1', 'png'), ('P', 'gif'),
   ('RGB', 'webp'), ('RGB', 'bmp'), ('LA', 'png'), ('RGBA', 'png'),
   ('YCbCr', 'tiff'), ('LAB', 'tiff'), ('CMYK', 'tiff')],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode, suffix):
  red = Image.new('RGB', (8, 6), RED)
  if mode in ('LA', 'RGBA'):
    red.putalpha(255)
  if mode == 'LAB':
    profiles = (ImageCms.createProfile(name) for name in ('sRGB', 'LAB'))
    picture = ImageCms.profileToProfile(red, *profiles, outputMode='LAB')
  else:
    picture = red.quantize() if mode == 'P' else red.convert(mode)
  actual = decode(encode(picture, suffix))
  assert actual.shape == (6, 8, 3)
  if mode in ('P', 'CMYK', 'RGB', 'RGBA', 'YCbCr', 'LAB'):
    distance = np.abs(actual.astype(int) - np.array(RED).reshape(1, 1, 3))
    assert distance.max() < 12
  else:
    assert np.ptp(actual, axis=-1).max() == 0


def test_cmyk_without_adobes_mark_is_not_inverted():
  data = encode(Image.new('RGB', (8, 8), RED).convert('CMYK'), 'jpeg')
  at = data.index(b'Adobe') - 4
  length = struct.unpack_from('>H', data, at + 2)[0]
  plain = data[:at] + data[at + 2 + length :]
  wanted = 255 - np.array(Image.new('RGB', (1, 1), RED).convert('CMYK'))
  rgb = Image.fromarray(wanted, 'CMYK').convert('RGB').getpixel((0, 0))
  distance = decode(plain).astype(int) - np.array(rgb)
  assert np.abs(distance).max() < 12


def test_transparent_parts_are_white_also_in_palettes():
  clear = Image.new('RGBA', (4, 4), (0, 0, 0, 0))
  assert np.asarray(pictures.to_rgb(clear)).min() == 255
  palette = Image.new('P', (4, 4), 1)
  palette.putpalette([0, 0, 0, 9, 9, 9])
  data = encode(palette, transparency=bytes([255, 0]))
  assert decode(data).min() == 255


@pytest.mark.parametrize(
  ('depth', 'colour', 'clear', 'other'),
  [
    (1, 0, b'\x00', b'\x80'),
    (2, 0, b'\x40', b'\xc0'),
    (4, 0, b'\x50', b'\xa0'),
    (8, 0, b'\x21', b'\x43'),
    (16, 0, b'\x80\x00', b'\x40\x00'),
    (8, 2, b'\x10\x20\x30', b'\x30\x20\x10'),
    (16, 2, b'\x10\x00\x20\x00\x30\x00', b'\x30\x00\x20\x00\x10\x00'),
  ],
)
def test_the_transparent_colour_of_a_png_is_white(depth, colour, clear, other):
  # Two rows of a pixel each.
  rows = b'\0' + clear + b'\0' + other
  if depth < 8:
    key = struct.pack('>H', clear[0] >> (8 - depth))
  elif depth == 8:
    key = b''.join(struct.pack('>H', level) for level in clear)
  else:
    key = clear
  image = decode(raw_png(1, 2, depth, colour, rows, chunk(b'tRNS', key)))
  assert image[0].min() == 255
  plain = decode(raw_png(1, 2, depth, colour, rows))
  np.testing.assert_array_equal(image[1], plain[1])


def test_sixteen_bits_keep_their_brightness():
  grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
  actual = decode(encode(grey))
  np.testing.assert_array_equal(actual, np.full((4, 4, 3), 0x80, np.uint8))
  wide = gradient().astype(np.uint16) * 257
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in wide)
  np.testing.assert_array_equal(
    decode(raw_png(30, 24, 16, 2, rows)), gradient()
  )


@pytest.mark.parametrize(
  ('low', 'high', 'first', 'last'),
  # Floats in [0, 1] keep their values, others are stretched.
  [(0, 1, 0, 255), (0.25, 0.5, 64, 128), (-5, 10, 0, 255), (0, 4000, 0, 255)],
)
def test_floats_are_scaled(low, high, first, last):
  ramp = np.linspace(low, high, 64, dtype=np.float32).reshape(1, 64)
  image = decode(encode(Image.fromarray(ramp), 'tiff'))
  assert (image[0, 0] == first).all()
  assert (image[0, -1] == last).all()
  assert (np.diff(image[0, :, 0].astype(int)) >= 0).all()


def test_numbers_that_are_none_do_no_harm():
  odd = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
  image = decode(encode(Image.fromarray(odd), 'tiff'))
  assert image[0, :, 0].tolist() == [0, 255, 0, 128]


def test_integers_of_32_bits_are_scaled_by_their_range():
  ramp = np.array([[-100, 0, 100]], np.int32)
  assert decode(encode(Image.fromarray(ramp), 'tiff'))[0, :, 0].tolist() == [
    0, 128, 255,
  ]  # fmt: skip


def test_of_an_animation_the_first_frame():
  frames = [Image.new('L', (8, 8), level) for level in (10, 200)]
  for kind in ('gif', 'webp', 'png', 'tiff'):
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert abs(int(decode(data).mean()) - 10) < 3, kind


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp', 'tiff'])
def test_pictures_are_turned_upright(orientation, kind):
  corners = np.zeros((16, 32, 3), np.uint8)
  corners[:8, :8] = 255
  exif = Image.Exif()
  exif[0x112] = orientation
  data = encode(Image.fromarray(corners), kind, exif=exif)
  image = decode(data) > 128
  # Where the bright corner of the stored picture is seen.
  row, column = {
    1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0),
    5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0),
  }[orientation]  # fmt: skip
  assert image.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
  assert image[row, column].all()
  assert 0.1 < image.mean() < 0.15
  assert pictures.is_turned(data) == (orientation > 1)
  stored = decode(data, exif=False)
  assert stored.shape == (16, 32, 3)
  assert (stored[0, 0] > 128).all()


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_does_no_harm():
  exif = b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12'
  data = encode(Image.fromarray(gradient()), 'jpeg', exif=exif)
  assert decode(data).shape == (24, 30, 3)


@pytest.mark.parametrize('place', ['before', 'after'])
def test_long_texts_do_no_harm(place):
  png = encode(Image.fromarray(gradient()))
  cut = png.index(b'IDAT' if place == 'before' else b'IEND') - 4
  text = b'workflow\0\0' + zlib.compress(b'{"n":1}' * 300_000)
  profile = b'icc\0\0' + zlib.compress(b'\0' * 3_000_000)
  extra = chunk(b'zTXt', text)
  if place == 'before':
    extra += chunk(b'iCCP', profile)
  long = png[:cut] + extra + png[cut:]
  np.testing.assert_array_equal(decode(long), gradient())


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp', 'gif', 'tiff', 'bmp'])
def test_cut_files_are_refused(kind):
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  data = encode(Image.fromarray(noise), kind)
  for kept in (len(data) // 3, len(data) * 2 // 3):
    with pytest.raises(
      pictures.PictureError, match='a/b is no image'
    ) as caught:
      decode(data[:kept])
    assert '\n' not in str(caught.value)


def test_a_cut_jpeg_that_was_filled_with_zeros_is_refused():
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  data = encode(Image.fromarray(noise), 'jpeg')
  padded = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
  with pytest.raises(pictures.PictureError, match='filled up with zeros'):
    decode(padded)
  # After its end anything may follow.
  assert decode(data + bytes(4096)).shape == (64, 64, 3)


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (b'', 'the file is empty'),
    (b'<html>404</html>', "begins with '<html>404</html>'"),
    (bytes(1000), 'of no known format'),
    (b'\x89PNG\r\n\x1a\n' + bytes(64), 'is no image'),
    (b'\xff\xd8\xff\xe0' + bytes(64), 'is no image'),
  ],
)
def test_what_is_no_picture_is_refused_with_the_reason(data, reason):
  with pytest.raises(errors.DataError, match=reason) as caught:
    decode(data)
  copy = pickle.loads(pickle.dumps(caught.value))
  assert (copy.name, copy.reason) == ('a/b', caught.value.reason)
  assert str(copy) == str(caught.value)


def test_a_flipped_bit_in_a_png_is_refused():
  data = bytearray(encode(Image.fromarray(gradient())))
  data[data.index(b'IDAT') + 20] ^= 16
  with pytest.raises(pictures.PictureError, match='checksum of its IDAT'):
    decode(bytes(data))


def test_pictures_over_the_limit_are_refused_before_they_are_decoded():
  # 400 million pixels, in a file of 50 KB that would take 1.2 GB.
  rows = zlib.compress(bytes(20_000 * 2_501), 9)
  header = struct.pack('>IIBBBBB', 20_000, 20_000, 1, 0, 0, 0, 0)
  data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows)
  data += chunk(b'IEND', b'')
  with pytest.raises(pictures.PictureError, match='20000 x 20000 are 400 mill'):
    decode(data)
  # Above Pillow's own limit of 89 million, which would warn.
  large = encode(Image.new('1', (10_000, 10_000)))
  assert decode(large).shape == (10_000, 10_000, 3)
  with pytest.raises(pictures.PictureError, match='data.max_pixels=1000000'):
    decode(large, max_pixels=1_000_000)


def test_avif_is_read_where_pillow_can():
  known = pictures.suffixes()
  assert known <= pictures.PICTURES
  if '.avif' not in known:
    pytest.skip('Pillow was built without AVIF')
  data = encode(Image.new('RGB', (16, 16), RED), 'avif')
  assert np.abs(decode(data).astype(int) - np.array(RED)).max() < 12


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch):
  calls = []

  class Plugin:
    @staticmethod
    def register_heif_opener():
      calls.append(1)

  monkeypatch.setattr(pictures, '_heif', None)
  monkeypatch.setitem(sys.modules, 'pillow_heif', Plugin)
  assert '.heic' in pictures.suffixes()
  assert '.heic' in pictures.suffixes()
  assert calls == [1]
  monkeypatch.setattr(pictures, '_heif', None)
  monkeypatch.setitem(sys.modules, 'pillow_heif', None)
  assert '.heic' not in pictures.suffixes()
  monkeypatch.setattr(pictures, '_heif', None)


def test_suffixes_are_those_of_real_files():
  for suffix in pictures.suffixes():
    assert pathlib.PurePath(f'x{suffix}').suffix == suffix


def test_a_damaged_text_does_no_harm():
  png = encode(Image.fromarray(gradient()))
  cut = png.index(b'IDAT') - 4
  text = bytearray(chunk(b'tEXt', b'Title\0a picture'))
  text[-1] ^= 1
  damaged = png[:cut] + bytes(text) + png[cut:]
  np.testing.assert_array_equal(decode(damaged), gradient())


def test_no_program_is_started_for_a_file():
  eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n'
  with pytest.raises(pictures.PictureError, match='of no known format'):
    decode(eps)


def test_whole_numbers_of_8_bits_are_levels():
  ramp = np.array([[0, 100, 255]], np.int32)
  image = decode(encode(Image.fromarray(ramp), 'tiff'))
  assert image[0, :, 0].tolist() == [0, 100, 255]
