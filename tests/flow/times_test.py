import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import times

COUNT = 20_000


@pytest.mark.parametrize('path', list(path_lib.PATHS))
@pytest.mark.parametrize('kind', list(times.TIMES))
def test_times_lie_where_the_velocity_is_finite(kind, path):
  path = path_lib.PATHS[path]
  t = times.TIMES[kind](jax.random.key(0), COUNT, path)
  assert t.shape == (COUNT,)
  assert np.all((t >= path.min_time) & (t <= 1))
  assert np.all(np.isfinite(path.d_sigma(t)))


def test_uniform_times_are_uniform():
  t = times.uniform(jax.random.key(0), COUNT, path_lib.PATHS['linear'])
  counts, _ = np.histogram(t, bins=10, range=(0, 1))
  np.testing.assert_allclose(counts, COUNT / 10, rtol=0.1)


@pytest.mark.parametrize('path', list(path_lib.PATHS))
def test_the_log_ratio_is_standard_normal(path):
  path = path_lib.PATHS[path]
  t = times.logit_normal(jax.random.key(0), COUNT, path)
  ratio = np.log(path.sigma(t) / path.alpha(t))
  np.testing.assert_allclose(np.mean(ratio), 0.0, atol=0.03)
  np.testing.assert_allclose(np.std(ratio), 1.0, rtol=0.03)


@pytest.mark.parametrize('path', list(path_lib.PATHS))
def test_time_at_inverts_the_ratio(path):
  path = path_lib.PATHS[path]
  wanted = jnp.linspace(-4.0, 4.0, 9)
  t = path.time_at(wanted)
  np.testing.assert_allclose(
    jnp.log(path.sigma(t) / path.alpha(t)), wanted, atol=2e-3
  )
