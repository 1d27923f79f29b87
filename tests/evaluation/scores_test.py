import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from selfboottok_jax import errors
from selfboottok_jax.evaluation import scores


def _pairs(count=3, height=20, width=26):
  """Smooth images with noise of growing strength; the last pair is flat."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:height, :width]
  base = 128 + 90 * np.sin(x / 5 + y / 7)[..., None] * [1, 0.7, -0.5]
  a, b = [], []
  for i in range(count):
    clean = base + 3 * rng.standard_normal(base.shape)
    a.append(clean)
    b.append(clean + 4 * (i + 1) * rng.standard_normal(base.shape))
  a.append(np.full(base.shape, 200.0))
  b.append(np.full(base.shape, 201.0))
  return tuple(np.clip(np.stack(v), 0, 255).astype(np.uint8) for v in (a, b))


def test_scores_are_those_of_scikit_image():
  a, b = _pairs()
  result = scores.image_scores(a, b)
  assert set(result) == set(scores.SCORES)
  for i in range(len(a)):
    x, y = a[i] / 255, b[i] / 255
    wanted = {
      'psnr': skimage.metrics.peak_signal_noise_ratio(x, y, data_range=1),
      'ssim': skimage.metrics.structural_similarity(
        x, y, channel_axis=-1, data_range=1
      ),
      'ssim_range2': skimage.metrics.structural_similarity(
        x, y, channel_axis=-1, data_range=2
      ),
    }
    for name, value in wanted.items():
      np.testing.assert_allclose(
        result[name][i], value, rtol=2e-6, err_msg=f'{name} {i}'
      )


def test_scores_of_equal_images_are_the_best_ones():
  a, b = _pairs()
  equal = scores.image_scores(a, a)
  other = scores.image_scores(a, b)
  np.testing.assert_array_equal(equal['psnr'], scores.PSNR_CAP)
  for name in ('ssim', 'ssim_range2'):
    np.testing.assert_allclose(equal[name], 1, rtol=1e-6)
  for name in scores.SCORES:
    assert (other[name] < equal[name]).all(), name
  # The last pair is flat: what remains there is the mean's share.
  assert (other['ssim_range2'] > other['ssim'])[:-1].all()


def test_scores_of_extreme_images():
  """Black against white: the largest of the integers, no overflow."""
  black = np.zeros((1, 16, 16, 3), np.uint8)
  white = np.full_like(black, 255)
  checks = (255 * (np.indices((16, 16)).sum(0) % 2)).astype(np.uint8)
  checks = np.broadcast_to(checks[None, ..., None], black.shape)
  result = scores.image_scores(black, white)
  np.testing.assert_allclose(result['psnr'], 0, atol=1e-6)
  np.testing.assert_allclose(result['ssim'], 1e-4 / (1 + 1e-4), atol=3e-6)
  wanted = skimage.metrics.structural_similarity(
    checks[0], 255 - checks[0], channel_axis=-1, data_range=255
  )
  np.testing.assert_allclose(
    scores.ssim(checks, 255 - checks)[0], wanted, rtol=1e-5
  )


def test_large_images_keep_their_digits():
  """A float32 sum over all pixels would be off in the fifth digit."""
  rng = np.random.default_rng(0)
  a = rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
  b = rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
  flat = np.full_like(a, 200)
  np.testing.assert_allclose(
    scores.ssim(flat, flat - 50)[0],
    (2 * 200 * 150 + 2.55**2) / (200**2 + 150**2 + 2.55**2),
    atol=1e-6,
  )
  result = scores.image_scores(a, b)
  square = np.square(a.astype(float) - b).mean() / 255**2
  np.testing.assert_allclose(result['psnr'][0], -10 * np.log10(square), 1e-6)
  wanted = skimage.metrics.structural_similarity(
    a[0], b[0], channel_axis=-1, data_range=255
  )
  np.testing.assert_allclose(result['ssim'][0], wanted, atol=1e-6)


def test_ssim_needs_a_window():
  image = np.zeros((1, 6, 9, 3), np.uint8)
  with pytest.raises(errors.UserError, match='6x9 images'):
    scores.ssim(image, image)


def test_baselines():
  a, b = _pairs()
  mean = np.concatenate([a[:2], b[:2]]).mean(axis=0).astype(np.uint8)
  result = scores.baseline_scores(a, mean)
  np.testing.assert_allclose(
    result['psnr_mean_image'],
    scores.psnr(a, np.broadcast_to(mean, a.shape)),
    rtol=1e-6,
  )
  painted = scores.mean_colour(a)
  colour = a.astype(float).mean(axis=(1, 2), keepdims=True)
  np.testing.assert_allclose(painted - colour, np.zeros(a.shape), atol=0.5)
  variance = np.square((a - colour) / 255).mean(axis=(1, 2, 3))[:-1]
  np.testing.assert_allclose(
    result['psnr_mean_colour'][:-1], -10 * np.log10(variance), rtol=1e-3
  )
  assert float(result['psnr_mean_colour'][-1]) == scores.PSNR_CAP


def test_sums_of_a_large_set_keep_all_digits():
  # The next float32 after 2^24 is 2 more.
  parts = [{'count': jnp.float32(2**24)}] + [{'count': jnp.float32(1)}] * 3
  assert scores.add_up(iter(parts))['count'] == 2**24 + 3
  with pytest.raises(errors.DataError, match='no images'):
    scores.add_up([])


def test_usage():
  histogram = np.array([[5, 5, 5, 5], [9, 0, 0, 0], [1, 1, 0, 0], [0] * 4])
  used, perplexity = scores.usage(histogram)
  np.testing.assert_allclose(used, [1, 0.25, 0.5, 0])
  np.testing.assert_allclose(perplexity, [4, 1, 2, 0])
  soft = np.array([[0.5, 0.25, 0.25]])
  np.testing.assert_allclose(scores.usage(soft)[1], [2**1.5], rtol=1e-12)


def test_scores_compile_once():
  a, b = _pairs()
  before = scores.image_scores._cache_size()
  jax.block_until_ready(scores.image_scores(a[:, :9, :9], b[:, :9, :9]))
  scores.image_scores(b[:, :9, :9], a[:, :9, :9])
  assert scores.image_scores._cache_size() == before + 1


@pytest.mark.parametrize(
  ('better', 'names'),
  [
    (True, 'psnr ssim ssim_range2 is precision recall'),
    (False, 'rfid fid sfid fdr fd_dinov2 lpips_vgg distance_hog'),
    (None, 'usage perplexity_global psnr_mean_image isotropy'),
  ],
)
def test_metrics_have_a_direction_or_none(better, names):
  for name in names.split():
    assert scores.higher_is_better(name) is better, name


def test_a_protocol_in_words():
  protocol = {'description': 'per image', 'run_weights': 'ab', 'count': 5}
  assert scores.in_words(protocol) == 'per image; run weights ab; count 5'
