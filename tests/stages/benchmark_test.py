import numpy as np
import pytest

from selfboottok_jax.stages import benchmark

# Whole benchmarks are run in tests/launch/benchmark_test.py.


def test_medians_need_something_to_measure():
  assert benchmark._rate(8, []) is None
  assert benchmark._rate(8, [1.0, 2.0, 4.0]) == 4.0
  assert benchmark._quartiles([1.0]) is None
  assert benchmark._quartiles([1.0, 2.0, 3.0]) == pytest.approx([1.0, 3.0])


def test_made_up_batches_are_images_or_codes_and_labels():
  rng = np.random.default_rng(0)
  images = benchmark.made_up(rng, (2, 4, 4, 3), np.dtype(np.uint8))
  assert images.dtype == np.uint8
  assert np.ptp(images) > 128
  codes = benchmark.made_up(rng, (2, 4, 4), np.float32)
  assert codes.dtype == np.float32
  assert np.ptp(codes) > 1
  assert np.abs(codes).max() <= 1
  labels = benchmark.made_up(rng, (2,), np.int32)
  np.testing.assert_array_equal(labels, [0, 0])


def test_peak_memory_is_known_everywhere():
  memory, of = benchmark._peak_memory()
  assert memory > 2**20
  assert of in ('device', 'process')
