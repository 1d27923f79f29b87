import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import resample


@pytest.mark.parametrize('antialias', [False, True])
def test_a_constant_stays_and_a_mirrored_image_gives_a_mirrored_one(
  antialias,
):
  for old, new in ((7, 16), (16, 7), (5, 5)):
    matrix = resample.resize_matrix(old, new, antialias=antialias)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    if old == new:
      np.testing.assert_allclose(matrix, np.eye(old), atol=1e-12)


def test_halving_by_hand():
  """The kernel is 0.59375 at 1 / 2 and -0.09375 at 3 / 2; borders repeat."""
  matrix = resample.resize_matrix(4, 2, antialias=False)
  np.testing.assert_allclose(
    matrix, [[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]]
  )


def test_positions_keep_rows_and_columns_apart():
  rows, columns = np.mgrid[:6, :4].astype(float)
  table = np.stack([rows, columns], axis=-1).reshape(24, 2)
  same = resample.resize_positions(table, (6, 4), (6, 4), antialias=True)
  np.testing.assert_array_equal(same, table)
  half = resample.resize_positions(
    table, (6, 4), (3, 2), antialias=False
  ).reshape(3, 2, 2)
  np.testing.assert_allclose(half[:, 0, 0], [0.40625, 2.5, 4.59375])
  np.testing.assert_allclose(half[0, :, 1], [0.40625, 2.59375])


def test_larger_patches_are_embedded_as_the_small_ones_were():
  """FlexiViT's Eq. 3: resized weights on resized patches."""
  rng = np.random.default_rng(0)
  kernel, patch = rng.normal(size=(4, 4, 3, 5)), rng.normal(size=(4, 4, 3))
  up = resample.resize_matrix(4, 6, antialias=True)
  larger = np.einsum('ij,kl,jlc->ikc', up, up, patch)
  resized = resample.resize_patch_kernel(kernel, 6)
  np.testing.assert_allclose(
    np.einsum('ijc,ijcd->d', larger, resized),
    np.einsum('ijc,ijcd->d', patch, kernel),
  )


def test_images_are_resized_along_both_sides():
  images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
  rows = resample.resize_matrix(4, 8, antialias=False)
  columns = resample.resize_matrix(6, 3, antialias=False)
  np.testing.assert_allclose(
    resample.resize_images(jnp.asarray(images, jnp.float32), (8, 3)),
    np.einsum('ij,kl,bjlc->bikc', rows, columns, images),
    atol=1e-5,
  )


def test_images_of_the_right_size_stay_as_they_are():
  images = jnp.ones((1, 4, 6, 3))
  assert resample.resize_images(images, (4, 6)) is images
