import resource
import tracemalloc

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


def covering_crop(image, height, width):
  """ADM's crop, for rectangles: the picture covers one, and is cut to it."""
  while image.width >= 2 * width and image.height >= 2 * height:
    image = image.resize((image.width // 2, image.height // 2), Image.BOX)
  scale = max(width / image.width, height / image.height)
  sides = round(image.width * scale), round(image.height * scale)
  pixels = np.array(image.resize(sides, resample=Image.BICUBIC))
  assert min(pixels.shape[0] - height, pixels.shape[1] - width) == 0
  top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
  return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize('size', [(24, 16), (16, 24), (10, 30), (16, 16)])
@pytest.mark.parametrize(
  'shape',
  [(24, 16), (16, 24), (33, 70), (64, 31), (100, 47), (9, 12), (96, 64)],
)
def test_evaluation_crop_of_rectangles_covers_and_cuts(shape, size):
  picture = trees.picture(0, shape)
  actual = transforms.center_crop(np.asarray(picture), size)
  np.testing.assert_array_equal(actual, covering_crop(picture, *size))
  if picture.size == size[::-1]:
    np.testing.assert_array_equal(actual, picture)


@pytest.mark.parametrize('size', [(24, 16), (16, 24), (7, 30), (1, 1)])
def test_training_crops_have_their_size_whatever_the_picture(size):
  rng = np.random.default_rng(0)
  transform = transforms.TrainTransform(size)
  for shape in rng.integers(1, 90, (40, 2)).tolist():
    element = {'image': np.zeros((*shape, 3), np.uint8), 'label': 0}
    assert transform(element, rng)['image'].shape == (*size, 3)


def test_training_rectangles_vary_in_scale_and_place():
  # The aspect of the crop, so that a scale of 1 shows all of it.
  down, right = np.meshgrid(np.arange(96), np.arange(64), indexing='ij')
  image = np.stack([2 * down, 3 * right, 0 * down], -1).astype(np.uint8)
  transform = transforms.TrainTransform((48, 32), flip=False)
  heights, widths, places = set(), set(), set()
  for seed in range(60):
    rng = np.random.default_rng(seed)
    seen = transform({'image': image, 'label': 0}, rng)['image'].astype(int)
    rows, columns = seen[:, 16, 0], seen[24, :, 1]
    heights.add((rows[-1] - rows[0]) / 190)
    widths.add((columns[-1] - columns[0]) / 189)
    places.add((rows[0] // 4, columns[0] // 4))
  # At 1.25 times the size a crop shows four fifths of each side.
  for shares in (heights, widths):
    assert 0.76 < min(shares) < 0.82
    assert 0.96 < max(shares) <= 1
  assert len(places) > 15


def test_squares_draw_as_they_always_did():
  """The scale, then the row, then the column, then the mirroring."""
  picture = trees.picture(0, (50, 70))
  for seed in range(20):
    rng = np.random.default_rng(seed)
    side = int(rng.integers(16, 21))
    scale = side / 25
    # Halved once: 35 x 25 is less than twice 20, and 16 to 18 fit no more.
    halved = picture.resize((25, 35), Image.BOX)
    whole = np.array(halved.resize((side, round(35 * scale)), Image.BICUBIC))
    top, left = rng.integers(whole.shape[0] - 15), rng.integers(side - 15)
    wanted = whole[top : top + 16, left : left + 16]
    wanted = wanted[:, ::-1] if rng.random() < 0.5 else wanted
    element = {'image': np.asarray(picture), 'label': 0}
    actual = transforms.TrainTransform(16)(element, np.random.default_rng(seed))
    np.testing.assert_array_equal(actual['image'], wanted)


@pytest.mark.parametrize('shape', [(3, 90), (90, 3)])
@pytest.mark.parametrize('size', [16, (24, 16), (16, 24)])
def test_a_part_is_what_the_whole_would_have_there(shape, size):
  # Smooth: where a kernel overshoots, Pillow clips after the first of its two
  # passes, whose order depends on what is resized.
  lines = (np.linspace(20, 220, side) for side in shape)
  image = sum(np.meshgrid(*lines, indexing='ij')) / 2
  image = np.repeat(image[..., None], 3, -1).astype(np.uint8)
  height, width = transforms.cover(shape, size)
  assert height * width > 16 * np.prod(size)
  actual = transforms.center_crop(image, size)
  wanted = covering_crop(Image.fromarray(image), *np.broadcast_to(size, 2))
  assert np.abs(actual.astype(int) - wanted).max() <= 1


def test_a_strip_takes_no_more_memory_than_its_crop():
  strip = np.zeros((1, 30_000, 3), np.uint8)
  strip[:, 15_000:] = 255
  tracemalloc.start()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  actual = transforms.center_crop(strip, 256)
  rng = np.random.default_rng(0)
  transforms.TrainTransform(256)({'image': strip, 'label': 0}, rng)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # Pillow's own memory is no part of it, but of the resident set, in KiB; the
  # whole would be 6 GB.
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert peak < 4e6
  assert grown < 50_000
  assert actual.shape == (256, 256, 3)
  # The middle of the strip is the step.
  assert actual[128, 0, 0] == 0
  assert actual[128, -1, 0] == 255


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
