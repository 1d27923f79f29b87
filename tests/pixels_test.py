import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pixels


def test_to_uint8():
  x = np.array([-7.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 7.0], np.float32)
  x = x.reshape(1, -1, 1)
  assert pixels.to_uint8(x).dtype == jnp.uint8
  assert pixels.to_uint8(x).ravel().tolist() == [
    0,
    0,
    0,
    127,
    254,
    255,
    255,
  ]
  rounded = pixels.to_uint8(x, rounding='round')
  assert rounded.ravel().tolist() == [0, 0, 0, 128, 255, 255, 255]
  with pytest.raises(errors.UserError, match='truncate, round'):
    pixels.to_uint8(x, rounding='floor')


def test_rounding_gives_every_level_back_and_truncation_nearly():
  levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
  x = levels.astype(np.float32) / 127.5 - 1
  np.testing.assert_array_equal(pixels.to_uint8(x, 'round'), levels)
  off = levels.astype(int) - np.asarray(pixels.to_uint8(x), int)
  assert set(off.ravel().tolist()) <= {0, 1}


# Without the checks of types that only tests have.
as_images = inspect.unwrap(pixels.as_images)
as_codes = inspect.unwrap(pixels.as_codes)


def test_bytes_become_floats():
  levels = np.array([0, 51, 255], np.uint8)
  images = np.broadcast_to(levels[:, None, None, None], (3, 2, 2, 3))
  found = pixels.as_images(images, 2)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[:, 0, 0, 0], [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(dtype):
  images = np.linspace(-1, 1, 24).reshape(2, 2, 2, 3).astype(dtype)
  found = pixels.as_images(images, 2)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, images.astype(np.float32), atol=1e-6)
  # A resampling overshoots by so much.
  pixels.as_images(images * dtype(1.0005), 2)


def test_no_images_are_images():
  assert pixels.as_images(np.zeros((0, 2, 2, 3), np.float32), 2).shape[0] == 0


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (
      np.zeros((2, 2, 3), np.uint8),
      r'shape \(2, 2, 3\); wanted \[b, 2, 2, 3\]',
    ),
    (np.zeros((1, 2, 4, 3), np.uint8), 'crop and resize them first'),
    (np.zeros((1, 2, 2, 1), np.uint8), r'shape \(1, 2, 2, 1\)'),
    (np.zeros((1, 2, 2, 3), np.int32), 'type int32; wanted uint8'),
    (np.zeros((1, 2, 2, 3), bool), 'type bool'),
    (np.full((1, 2, 2, 3), 255.0), r'from 255 to 255; wanted \[-1, 1\]'),
    (np.full((1, 2, 2, 3), -1.1), 'give uint8, or rescale'),
    (np.full((1, 2, 2, 3), np.nan), 'from nan'),
  ],
)
def test_what_are_no_images(images, message):
  with pytest.raises(errors.UserError, match=message):
    as_images(images, 2)


def test_codes_become_float32():
  codes = np.zeros((2, 4, 3), np.float16)
  assert pixels.as_codes(codes, 4, 3).dtype == jnp.float32


@pytest.mark.parametrize('shape', [(4, 3), (1, 3, 4), (1, 4, 3, 1)])
def test_what_are_no_codes(shape):
  with pytest.raises(errors.UserError, match=r'wanted \[b, 4, 3\]'):
    as_codes(np.zeros(shape, np.float32), 4, 3)


def test_levels_become_floats_of_the_same_kind():
  levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  of_numpy, of_jax = map(pixels.to_float, (levels, jnp.asarray(levels)))
  assert isinstance(of_numpy, np.ndarray)
  assert of_numpy.dtype == np.float32
  wanted = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
  for found in (of_numpy, of_jax, jax.jit(pixels.to_float)(levels)):
    np.testing.assert_array_equal(found, wanted)
  # Nor would a fused multiply-add, which rounds the sum alone, change a bit:
  # the sum of both products is exact in float64.
  wide = levels.astype(np.float64)
  fused = (wide * pixels._HIGH + wide * pixels._LOW).astype(np.float32)
  np.testing.assert_array_equal(fused - np.float32(1), wanted)
  np.testing.assert_array_equal(pixels.to_uint8(of_jax, 'round'), levels)


def test_images_are_taken_while_a_function_is_traced():
  images = np.full((2, 4, 4, 3), 0.5, np.float32)

  def total(x):
    return jnp.sum(pixels.as_images(x, 4))

  assert jax.jit(total)(images) == 48
  np.testing.assert_array_equal(jax.grad(total)(images), np.ones_like(images))
  with pytest.raises(errors.UserError, match='crop and resize'):
    jax.jit(total)(images[:, :2])
