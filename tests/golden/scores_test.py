import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import pixels
from selfboottok_jax.evaluation import scores
from tests.golden import fixtures

NAME = 'tok10_psnr_ssim'


@pytest.mark.golden
def test_psnr_and_ssim():
  """The scikit-image conventions of the reference, range 2 and range 1.

  Left out are `out_tm_*` (torchmetrics: 11x11 Gaussian windows, ranges taken
  from the data) and `out_ssim_gaussian_wang_u8`: our protocol is the 7x7
  uniform window, and a number of another protocol has no place beside it.
  """
  fixture = fixtures.load('tokenizer', NAME)
  arrays = fixture.arrays
  original = arrays['in_gt_u8']
  reconstruction = pixels.to_uint8(arrays['in_recon_float'], 'round')
  fixtures.check(NAME, 'out_recon_u8', reconstruction, arrays['out_recon_u8'])
  result = scores.image_scores(original, reconstruction)
  for array, score in {
    'out_psnr_ref': 'psnr',
    'out_psnr_u8': 'psnr',
    'out_ssim_correct_range1': 'ssim',
    'out_ssim_u8': 'ssim',
    'out_ssim_ref_range2': 'ssim_range2',
  }.items():
    fixtures.check(NAME, array, result[score], arrays[array])


@pytest.mark.golden
def test_means_are_over_images():
  arrays = fixtures.load('tokenizer', NAME).arrays
  count = len(arrays['in_gt_u8'])
  pairs = (
    [jnp.asarray(arrays[k][i : i + 1]) for k in ('in_gt_u8', 'out_recon_u8')]
    for i in range(count)
  )
  totals = scores.add_up(scores.image_scores(*pair) for pair in pairs)
  fixtures.check(
    NAME,
    'out_psnr_ref_mean',
    totals['psnr'][0] / count,
    np.mean(arrays['out_psnr_ref']),
  )
