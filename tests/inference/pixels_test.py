import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.inference import pixels


def test_to_uint8():
  x = np.array([-7.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 7.0], np.float32)
  x = x.reshape(1, -1, 1)
  assert pixels.to_uint8(x).dtype == jnp.uint8
  assert pixels.to_uint8(x).ravel().tolist() == [0, 0, 0, 127, 254, 255, 255]
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
