import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import path as path_lib

ALL = sorted(path_lib.PATHS)
T = np.array([0.05, 0.3, 0.5, 0.8, 0.99], np.float32)


def _pair(shape=(5, 3, 2)):
  keys = jax.random.split(jax.random.key(0))
  return [jax.random.normal(k, shape) for k in keys]


@pytest.mark.parametrize('name', ALL)
def test_derivatives_are_those_of_the_coefficients(name):
  path = path_lib.PATHS[name]
  with jax.enable_x64(True):
    t = jnp.asarray(T, jnp.float64)
    for f, d in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
      np.testing.assert_allclose(d(t), jax.vmap(jax.grad(f))(t), rtol=1e-10)


@pytest.mark.parametrize('name', ALL)
def test_ends_are_data_and_noise(name):
  path = path_lib.PATHS[name]
  x, noise = _pair()
  zero, one = jnp.zeros(5), jnp.ones(5)
  np.testing.assert_array_equal(path.interpolate(x, noise, zero), x)
  # The variance-preserving path keeps exp(-5) of the data at its end.
  left = np.asarray(x * path_lib.align(path.alpha(one), x))
  np.testing.assert_allclose(
    path.interpolate(x, noise, one) - left, noise, atol=1e-4
  )
  assert np.all(path.alpha(one) < 0.01)


@pytest.mark.parametrize('name', ALL)
def test_state_and_velocity_give_back_data_noise_and_score(name):
  path = path_lib.PATHS[name]
  x, noise = _pair()
  t = jnp.asarray(T)
  state = path.interpolate(x, noise, t)
  v = path.velocity(x, noise, t)
  np.testing.assert_allclose(
    path.noise_from_velocity(v, state, t), noise, atol=1e-4
  )
  # At t = .99 the state holds 1% of the data, in float32.
  np.testing.assert_allclose(path.data_from_velocity(v, state, t), x, atol=5e-3)
  np.testing.assert_allclose(
    path.score_from_velocity(v, state, t),
    -noise / path_lib.align(path.sigma(t), x),
    rtol=1e-4,
    atol=2e-4,
  )


@pytest.mark.parametrize('name', ALL)
def test_velocity_is_finite_from_min_time_on(name):
  path = path_lib.PATHS[name]
  x, noise = _pair()
  for t in (path.min_time, 1.0):
    assert np.isfinite(path.velocity(x, noise, jnp.full((5,), t))).all()
  if path.min_time:
    v = path.velocity(x, noise, jnp.zeros((5,)))
    assert not np.isfinite(v).all()


def test_one_time_for_all_samples_is_allowed():
  x, noise = _pair()
  path = path_lib.PATHS['linear']
  np.testing.assert_array_equal(
    path.interpolate(x, noise, jnp.float32(0.25)),
    path.interpolate(x, noise, jnp.full((5,), 0.25)),
  )


COUNT = 20_000


@pytest.mark.parametrize('path', list(path_lib.PATHS))
@pytest.mark.parametrize('kind', list(path_lib.TIMES))
def test_times_lie_where_the_velocity_is_finite(kind, path):
  path = path_lib.PATHS[path]
  t = path_lib.TIMES[kind](jax.random.key(0), COUNT, path)
  assert t.shape == (COUNT,)
  assert np.all((t >= path.min_time) & (t <= 1))
  assert np.all(np.isfinite(path.d_sigma(t)))


def test_uniform_times_are_uniform():
  t = path_lib.uniform(jax.random.key(0), COUNT, path_lib.PATHS['linear'])
  counts, _ = np.histogram(t, bins=10, range=(0, 1))
  np.testing.assert_allclose(counts, COUNT / 10, rtol=0.1)


@pytest.mark.parametrize('path', list(path_lib.PATHS))
def test_the_log_ratio_is_standard_normal(path):
  path = path_lib.PATHS[path]
  t = path_lib.logit_normal(jax.random.key(0), COUNT, path)
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
