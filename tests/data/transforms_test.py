
import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import pixels
from selfboottok_jax.data import transforms
from tests.data import trees


def adm_crop(image, size):
  """ADM's crop in its own words, on a Pillow image."""
  while min(image.size) >= 2 * size:
    half = tuple(side // 2 for side in image.size)
    image = image.resize(half, resample=Image.BOX)
  scale = size / min(image.size)
  sides = tuple(round(side * scale) for side in image.size)
  pixels = np.array(image.resize(sides, resample=Image.BICUBIC))
  top, left = ((side - size) // 2 for side in pixels.shape[:2])
  return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
  'shape', [(16, 16), (33, 70), (64, 31), (200, 47), (9, 12), (16, 40)]
)
def test_evaluation_crop_is_adm(shape):
  picture = trees.picture(0, shape)
  actual = transforms.center_crop(np.asarray(picture), 16)
  np.testing.assert_array_equal(actual, adm_crop(picture, 16))


def test_to_float_covers_the_range():
  actual = pixels.to_float(np.array([0, 255], np.uint8))
  assert actual.dtype == np.float32
  np.testing.assert_array_equal(actual, np.array([-1, 1], np.float32))


def test_training_pictures_vary_in_scale_place_and_mirroring():
  # Red grows to the right and green downwards, so both corners tell all.
  ramp = np.linspace(0, 255, 64).astype(np.uint8)
  red, green = np.meshgrid(ramp, ramp)
  image = np.stack([red, green, red * 0], -1)
  transform = transforms.TrainTransform(32)
  spans, lefts, mirrored = set(), set(), 0
  for seed in range(60):
    element = {'image': image, 'label': 3}
    actual = transform(element, np.random.default_rng(seed))
    picture = actual['image']
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
    assert actual['label'] == 3
    assert actual['label'].dtype == np.int32
    ends = pixels.to_float(picture[16, [0, -1], 0])
    mirrored += int(ends[1] < ends[0])
    spans.add(round(float(np.ptp(ends)), 2))
    lefts.add(round(float(ends.min()), 2))
  # At 1.25 times the size, 32 of 40 columns are seen.
  assert 1.45 < min(spans) < 1.65
  assert 1.85 < max(spans) <= 2
  assert len(lefts) > 5
  assert 15 < mirrored < 45


def test_centre_crops_are_mirrored_by_the_first_draw():
  image = np.asarray(trees.picture(0, (40, 30)))
  centre = transforms.center_crop(image, 16)
  transform = transforms.TrainTransform(16, random_crop=False)
  seen = set()
  for seed in range(20):
    rng = np.random.default_rng(seed)
    actual = transform({'image': image, 'label': 0}, rng)['image']
    mirrored = np.random.default_rng(seed).random() < 0.5
    np.testing.assert_array_equal(
      actual, centre[:, ::-1] if mirrored else centre
    )
    seen.add(mirrored)
    # And the only one.
    rest = np.random.default_rng(seed)
    rest.random()
    assert rng.random() == rest.random()
  assert seen == {True, False}


def test_mirrored_pictures_are_read_from_the_right():
  image = np.asarray(trees.picture(0, (40, 30)))[3:20, 5:]
  mirrored = transforms.mirror(image)
  np.testing.assert_array_equal(mirrored, image[:, ::-1])
  assert mirrored.flags.c_contiguous


def test_without_flips_nothing_is_drawn():
  rng = np.random.default_rng(0)
  assert not transforms.mirrors(False, rng)
  assert rng.random() == np.random.default_rng(0).random()


def test_fields_switch_augmentation_off():
  image = np.asarray(trees.picture(0, (16, 16)))
  transform = transforms.TrainTransform(16, max_scale=1.0, flip=False)
  actual = transform({'image': image, 'label': 0}, np.random.default_rng(1))
  np.testing.assert_array_equal(actual['image'], image)
