import dataclasses
import json

import numpy as np

from selfboottok_jax.data import latent_statistics


def _codes():
  rng = np.random.default_rng(0)
  scales, shifts = np.array([0.5, 2.0, 3.0]), np.array([-1.0, 0.0, 10.0])
  return rng.normal(size=(40, 4, 3)) * scales + shifts


def test_statistics_are_numpys_however_the_codes_are_cut():
  codes = _codes().astype(np.float32)
  parts = []
  for part in np.split(codes, [10, 11, 30]):
    sums = latent_statistics.Sums()
    for batch in np.array_split(part, 2):
      if len(batch):
        sums.add(batch)
    # What a file keeps of them is all.
    told = json.loads(json.dumps(sums.to_json()))
    parts.append(latent_statistics.Sums(**told))
  actual = latent_statistics.combine(parts)
  wide = codes.astype(np.float64)
  assert actual.count == 40
  np.testing.assert_allclose(actual.mean, wide.mean(), rtol=1e-12)
  np.testing.assert_allclose(actual.std, wide.std(), rtol=1e-12)
  np.testing.assert_allclose(actual.channel_mean, wide.mean((0, 1)), rtol=1e-12)
  np.testing.assert_allclose(actual.channel_std, wide.std((0, 1)), rtol=1e-10)


def test_half_precision_is_summed_in_double():
  codes = np.full((4000, 4, 2), 0.1, np.float16)
  sums = latent_statistics.Sums()
  sums.add(codes)
  actual = latent_statistics.combine([sums])
  np.testing.assert_allclose(actual.mean, np.float64(codes[0, 0, 0]))
  assert actual.std < 1e-7


def test_statistics_come_back_from_json():
  sums = latent_statistics.Sums()
  sums.add(_codes())
  statistics = latent_statistics.combine([sums])
  told = json.loads(json.dumps(dataclasses.asdict(statistics)))
  assert latent_statistics.Statistics.from_json(told) == statistics
