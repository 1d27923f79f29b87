import inspect
import types

import jax
import pytest

from selfboottok_jax.inference import device_batch

# Without the checks of types that only tests have.
default = inspect.unwrap(device_batch.default)
memory_limit = inspect.unwrap(device_batch.memory_limit)


def _device(platform, **stats):
  return types.SimpleNamespace(
    platform=platform, memory_stats=lambda: stats or None
  )


def test_the_default_needs_no_look_at_memory():
  assert default(jax.devices()) == 4
  assert default([_device('gpu')]) == 32


def test_the_smallest_device_limits_all():
  small, large = (_device('gpu', bytes_limit=n) for n in (1000, 2000))
  assert memory_limit([large, small]) == 900
  # Nothing is known of a CPU.
  assert memory_limit(jax.devices()) is None
  assert memory_limit([small, _device('gpu')]) is None


@pytest.mark.parametrize(
  ('limit', 'most', 'wanted', 'tried'),
  [
    # The parameters are 100, and each sample takes 10.
    (10_000, 256, 256, [256]),
    (2_660, 256, 256, [256]),
    (2_659, 256, 128, [256, 128]),
    # 128 samples take 1,330 at least, half of the 2,660 of 256.
    (1_000, 256, 64, [256, 64]),
    (700, 256, 32, [256, 64, 32]),
    (120, 256, 2, [256, 8, 4, 2]),
    (10, 256, 1, [256]),
    (10_000, 100, 64, [64]),
    (10_000, 1, 1, []),
  ],
)
def test_the_largest_power_of_two_that_fits(limit, most, wanted, tried):
  seen = []

  def needed(size):
    seen.append(size)
    return 100 + 10 * size

  assert device_batch.largest_that_fits(needed, limit, most) == wanted
  assert seen == tried


def test_what_the_compiler_refuses_is_too_large():
  def needed(size):
    return None if size > 32 else size

  assert device_batch.largest_that_fits(needed, 10_000) == 32
