import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import encoder, layers
from tests import tiny

MODEL = encoder.Encoder(4, 5, 3, 16, 2, 2)


@pytest.fixture(scope='module')
def params():
  fresh = jax.jit(MODEL.init)(jax.random.key(0), tiny.images(1))
  np.testing.assert_array_equal(
    fresh['params']['patch_positions'][0], layers.sincos_2d(4, 16)
  )
  return tiny.awake(fresh)


def test_every_token_reads_every_pixel_of_its_own_image(params):
  images = tiny.images(2)
  jacobian = jax.jit(jax.jacrev(lambda x: MODEL.apply(params, x)[0].sum(-1)))(
    images
  )
  assert jacobian.shape == (5, *images.shape)
  assert np.all(jacobian[:, 0] != 0)
  np.testing.assert_array_equal(jacobian[:, 1], 0.0)


def test_codes_are_float32_whatever_the_blocks_are(params):
  images = tiny.images(2)
  wide = jax.jit(MODEL.apply)(params, images)
  narrow = jax.jit(MODEL.clone(dtype='bfloat16').apply)(params, images)
  assert narrow.dtype == jnp.float32
  assert narrow.shape == wide.shape == (2, 5, 3)
  assert 0 < np.abs(narrow - wide).max() < 0.3 * np.abs(wide).max()


def test_position_of_a_patch_matters(params):
  images = tiny.images(1)
  apply = jax.jit(MODEL.apply)
  turned = apply(params, images[:, ::-1])
  assert np.abs(apply(params, images) - turned).max() > 1e-2
