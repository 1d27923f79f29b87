import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.inference import checks

# Without the checks of types that only tests have.
as_images = inspect.unwrap(checks.as_images)
as_codes = inspect.unwrap(checks.as_codes)


def test_bytes_become_floats():
  levels = np.array([0, 51, 255], np.uint8)
  images = np.broadcast_to(levels[:, None, None, None], (3, 2, 2, 3))
  found = checks.as_images(images, 2)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[:, 0, 0, 0], [-1, -0.6, 1], atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(dtype):
  images = np.linspace(-1, 1, 24).reshape(2, 2, 2, 3).astype(dtype)
  found = checks.as_images(images, 2)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, images.astype(np.float32), atol=1e-6)
  # A resampling overshoots by so much.
  checks.as_images(images * dtype(1.0005), 2)


def test_no_images_are_images():
  assert checks.as_images(np.zeros((0, 2, 2, 3), np.float32), 2).shape[0] == 0


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
  assert checks.as_codes(codes, 4, 3).dtype == jnp.float32


@pytest.mark.parametrize('shape', [(4, 3), (1, 3, 4), (1, 4, 3, 1)])
def test_what_are_no_codes(shape):
  with pytest.raises(errors.UserError, match=r'wanted \[b, 4, 3\]'):
    as_codes(np.zeros(shape, np.float32), 4, 3)


def test_labels_and_indices_become_32_bits():
  labels = checks.as_labels([0, 4], 5)
  assert labels.dtype == np.int32
  assert checks.as_indices(None, 3).tolist() == [0, 1, 2]
  assert checks.as_indices(np.array([7, 2**31 - 1]), 2).dtype == np.int32


@pytest.mark.parametrize(
  'indices', [[0], [-1, 0], [0, 2**31], [0.0, 1.0], [[0, 1]]]
)
def test_indices_of_no_samples(indices):
  with pytest.raises(errors.UserError, match='wanted 2 integers, one for each'):
    checks.as_indices(indices, 2)
