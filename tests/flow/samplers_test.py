import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import samplers

MEAN, STD = 0.7, 0.4
LINEAR = path_lib.PATHS['linear']


def _field(path):
  """The exact velocity for data N(MEAN, STD^2)."""

  def velocity(x, t):
    alpha, sigma = path.alpha(t), path.sigma(t)
    rest = x - path_lib.align(alpha * MEAN, x)
    var = alpha**2 * STD**2 + sigma**2
    data = MEAN + path_lib.align(alpha * STD**2 / var, x) * rest
    noise = path_lib.align(sigma / var, x) * rest
    return path.velocity(data, noise, t)

  return velocity


def _exact(x, path):
  """Where the flow carries x from t = 1, in closed form."""
  one = np.ones(())
  alpha, sigma = float(path.alpha(one)), float(path.sigma(one))
  return MEAN + STD * (x - alpha * MEAN) / np.hypot(alpha * STD, sigma)


@pytest.mark.parametrize(
  ('name', 'factor'), [('ode', 2.0), ('heun', 4.0), ('heun_euler', 4.0)]
)
@pytest.mark.parametrize('path', ['linear', 'cosine'])
def test_error_falls_by_the_order(name, factor, path):
  path = path_lib.PATHS[path]
  sampler = samplers.SAMPLERS[name.split('_')[0]]
  if name == 'heun_euler':
    sampler = functools.partial(sampler, final_step='euler')
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    found = [
      sampler(_field(path), x, samplers.time_grid('ode', n), path=path)
      for n in (32, 64, 128)
    ]
    assert found[0].dtype == jnp.float64
    gaps = [float(np.abs(f - _exact(x, path)).max()) for f in found]
  assert gaps[-1] < 2e-2
  ratios = np.divide(gaps[:-1], gaps[1:])
  np.testing.assert_allclose(ratios, factor, rtol=0.15)


def test_heun_ends_with_euler_only_where_the_velocity_is_infinite():
  x = jnp.asarray([[0.5], [-1.0]])
  times = samplers.time_grid('heun', 3)
  run = functools.partial(samplers.heun, x=x, times=times)
  for name, final in (('linear', 'heun'), ('vp', 'euler')):
    path = path_lib.PATHS[name]
    default = run(_field(path), path=path)
    assert np.isfinite(default).all()
    explicit = run(_field(path), path=path, final_step=final)
    np.testing.assert_array_equal(default, explicit)
  euler = run(_field(LINEAR), path=LINEAR, final_step='euler')
  heun = run(_field(LINEAR), path=LINEAR)
  assert np.abs(euler - heun).max() > 1e-3


@pytest.mark.parametrize('diffusion', sorted(samplers.DIFFUSIONS))
@pytest.mark.parametrize('name', sorted(path_lib.PATHS))
def test_sde_ends_in_the_distribution_of_the_data(name, diffusion):
  path = path_lib.PATHS[name]

  @jax.jit
  def run(seed):
    x, steps = samplers.make_noise(seed, jnp.arange(8192), (1,))
    return samplers.euler_maruyama(
      _field(path),
      x,
      samplers.time_grid('sde', 200, 0.01),
      path=path,
      noise=steps,
      diffusion=diffusion,
    )

  x = np.asarray(run(3))
  assert abs(x.mean() - MEAN) < 0.02
  assert abs(x.std() - STD) < 0.02


def test_diffusions_coincide_on_the_linear_path_only():
  t = jnp.linspace(0.1, 1, 5)
  for name, same in (('linear', True), ('cosine', False), ('vp', False)):
    a, b = (w(path_lib.PATHS[name], t) for w in samplers.DIFFUSIONS.values())
    assert np.allclose(a, b) == same


def test_last_sde_step_adds_no_noise_and_the_others_do():
  x = jnp.ones((2, 3))
  times = samplers.time_grid('sde', 4)

  def run(loud):
    return samplers.euler_maruyama(
      _field(LINEAR),
      x,
      times,
      path=LINEAR,
      noise=lambda i: jnp.where(i == loud, 1.0, 0.0) * x,
    )

  ends = [np.asarray(run(i)) for i in (-1, 0, 1, 2, 3)]
  np.testing.assert_array_equal(ends[0], ends[4])
  for end in ends[1:4]:
    assert np.abs(end - ends[0]).min() > 1e-3


def test_grids():
  np.testing.assert_allclose(
    samplers.time_grid('ode', 4), [1, 0.75, 0.5, 0.25, 0]
  )
  np.testing.assert_array_equal(
    samplers.time_grid('heun', 4), samplers.time_grid('ode', 4)
  )
  np.testing.assert_allclose(
    samplers.time_grid('sde', 3, 0.2), [1, 0.6, 0.2, 0]
  )
  for name in samplers.SAMPLERS:
    for steps in (1, 2, 7):
      grid = samplers.time_grid(name, steps)
      assert len(grid) == steps + 1
      assert (grid[0], grid[-1]) == (1, 0)
      assert np.all(np.diff(grid) < 0)


def test_wrong_choices_say_what_to_choose():
  x, times = jnp.ones((2, 1)), samplers.time_grid('ode', 2)
  with pytest.raises(errors.UserError, match='num_steps=0'):
    samplers.time_grid('ode', 0)
  with pytest.raises(errors.UserError, match='sde, ode, heun'):
    samplers.time_grid('rk4', 3)
  with pytest.raises(errors.UserError, match='last_step=0'):
    samplers.time_grid('sde', 3, 0.0)
  with pytest.raises(errors.UserError, match='choose one of euler, heun'):
    samplers.heun(_field(LINEAR), x, times, path=LINEAR, final_step='rk')
  with pytest.raises(errors.UserError, match='choose one of 2t, sigma'):
    samplers.euler_maruyama(
      _field(LINEAR), x, times, path=LINEAR, noise=lambda i: x, diffusion='t'
    )


@pytest.mark.parametrize('name', sorted(samplers.SAMPLERS))
def test_records_every_state_and_integrates_in_float32(name):
  x = jnp.ones((2, 3), jnp.bfloat16)
  options = {'noise': lambda i: x} if name == 'sde' else {}
  run = functools.partial(
    samplers.SAMPLERS[name],
    _field(LINEAR),
    x,
    samplers.time_grid(name, 4),
    path=LINEAR,
    **options,
  )
  states, end = run(record=True), run()
  assert states.shape == (5, 2, 3)
  assert end.dtype == states.dtype == jnp.float32
  np.testing.assert_array_equal(states[0], x.astype(jnp.float32))
  np.testing.assert_array_equal(states[-1], end)


def test_a_shift_below_one_keeps_the_ends_and_crowds_the_noise():
  for sampler in samplers.SAMPLERS:
    even = samplers.time_grid(sampler, 10)
    shifted = samplers.time_grid(sampler, 10, shift=0.3)
    assert len(even) == len(shifted)
    assert (shifted[0], shifted[-1]) == (1.0, 0.0)
    assert np.all(np.diff(shifted) < 0)
    assert np.all(shifted[1:-1] > even[1:-1])
  np.testing.assert_array_equal(
    samplers.time_grid('ode', 10, shift=1.0), samplers.time_grid('ode', 10)
  )
  with pytest.raises(errors.UserError, match='time_shift=0.0: give a number'):
    samplers.time_grid('ode', 10, shift=0.0)


def test_noise_belongs_to_the_sample_not_to_the_batch():
  indices = jnp.arange(100, 108)
  draw = functools.partial(samplers.sample_noise, 5, step=2, shapes=(4, 3))
  whole = draw(sample_indices=indices)
  halves = [draw(sample_indices=h) for h in jnp.split(indices, 2)]
  np.testing.assert_array_equal(whole, jnp.concatenate(halves))
  np.testing.assert_array_equal(whole[::-1], draw(sample_indices=indices[::-1]))
  with jax.enable_x64(True):
    wide = draw(sample_indices=jnp.arange(100, 108))
  assert wide.dtype == jnp.float32
  np.testing.assert_array_equal(whole, wide)


def test_noise_is_the_same_on_eight_devices():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  indices = jnp.arange(16)
  draw = jax.jit(lambda i: samplers.sample_noise(1, i, 0, (6,)))
  np.testing.assert_array_equal(
    draw(indices), draw(jax.device_put(indices, spec))
  )


def test_no_two_draws_are_alike():
  start, steps = samplers.make_noise(0, jnp.arange(3), (500,))
  draws = [start, steps(0), steps(1)]
  draws.append(samplers.make_noise(1, jnp.arange(3), (500,))[0])
  rows = np.concatenate(draws)
  np.testing.assert_allclose(np.corrcoef(rows), np.eye(12), atol=0.2)
  assert abs(rows.mean()) < 0.05
  assert abs(rows.std() - 1) < 0.05


def test_leaves_of_a_state_are_independent():
  shapes = {'cls': (4, 3), 'tokens': (4, 3)}
  draw = samplers.sample_noise(5, jnp.arange(200), 1, shapes)
  assert {k: v.shape for k, v in draw.items()} == {
    'cls': (200, 4, 3),
    'tokens': (200, 4, 3),
  }
  both = np.corrcoef(np.ravel(draw['cls']), np.ravel(draw['tokens']))
  assert abs(both[0, 1]) < 0.1


def test_labels_belong_to_the_sample():
  whole = samplers.sample_labels(3, jnp.arange(5000), 10)
  part = samplers.sample_labels(3, jnp.array([7, 4000]), 10)
  np.testing.assert_array_equal(part, whole[jnp.array([7, 4000])])
  counts = np.bincount(whole, minlength=10)
  assert len(counts) == 10
  np.testing.assert_allclose(counts, 500, rtol=0.2)
  assert np.any(samplers.sample_labels(4, jnp.arange(5000), 10) != whole)
