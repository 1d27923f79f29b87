import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.flow import guidance, samplers
from selfboottok_jax.flow import path as path_lib

NULL = 9
B = 3
LABELS = jnp.asarray([1, 4, 2])
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, 2, 4)), jnp.float32)


def velocity(x, t, labels):
  """Another curve for each label; the null label has none of its own."""
  pull = jnp.where(labels == NULL, 0, labels).astype(x.dtype)
  return x * path_lib.align(jnp.cos(t), x) + path_lib.align(pull, x)


def _options(sampler):
  return {'noise': lambda i: jnp.sin(X + i)} if sampler == 'sde' else {}


def _sample(sampler='ode', velocity=velocity, **kwargs):
  defaults = {'null_label': NULL, 'path': path_lib.PATHS['linear']}
  return guidance.sample(
    velocity,
    X,
    LABELS,
    sampler=sampler,
    **defaults | {'num_steps': 5} | _options(sampler) | kwargs,
  )


def _calls(sampler, interval=(0.0, 1.0), is_traced=False, **kwargs):
  """Time, rows and labels of each evaluation of the network, in order."""
  calls = []

  def counted(x, t, labels):
    rows = len(x)
    jax.debug.callback(
      lambda t, y: calls.append((float(t), rows, y.tolist())),
      t[0],
      labels,
      ordered=True,
    )
    return velocity(x, t, labels)

  def run(*interval):
    return _sample(sampler, counted, interval=interval, **kwargs)

  jax.block_until_ready((jax.jit(run) if is_traced else run)(*interval))
  jax.effects_barrier()
  return calls


@pytest.mark.parametrize('is_traced', [False, True])
@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_rows_are_doubled_inside_the_interval_only(sampler, is_traced):
  calls = _calls(sampler, (0.15, 0.7), is_traced, scale=2.0, num_steps=10)
  starts = samplers.time_grid(sampler, 10)[:-1]
  stages = 2 if sampler == 'heun' else 1
  want = [B + B * (0.15 <= t <= 0.7 + 1e-9) for t in starts]
  assert [rows for _, rows, _ in calls] == list(np.repeat(want, stages))
  np.testing.assert_allclose(
    [t for t, _, _ in calls][::stages], starts, atol=1e-6
  )
  for _, rows, labels in calls:
    assert labels == LABELS.tolist() + [NULL] * (rows - B)


def test_ends_of_the_interval_are_inside_whatever_the_rounding():
  for steps in (5, 10, 20, 30):
    grid = samplers.time_grid('ode', steps)
    for i in range(steps):
      end = (steps - i) / steps  # what a user types for grid[i]
      for interval, inside in (((end, 1.0), i + 1), ((0.0, end), steps - i)):
        field = guidance.guided(
          velocity, LABELS, null_label=NULL, scale=2.0, interval=interval
        )
        found = sum(field.at(float(t)) is field.inside for t in grid[:-1])
        assert found == inside
        # In the precision of a program, too, and off by its last bit.
        low, high = interval
        low = np.nextafter(np.float32(low), np.float32(2))
        high = np.nextafter(np.float32(high), np.float32(-1))
        rounded = (jnp.float32(x) for x in (grid[:-1], low, high))
        assert samplers.is_within(*rounded).sum() == inside


@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_scale_one_is_the_conditional_model_at_its_cost(sampler):
  unguided = samplers.SAMPLERS[sampler](
    lambda x, t: velocity(x, t, LABELS),
    X,
    samplers.time_grid(sampler, 5),
    path=path_lib.PATHS['linear'],
    **_options(sampler),
  )
  np.testing.assert_array_equal(_sample(sampler, scale=1.0), unguided)
  assert {rows for _, rows, _ in _calls(sampler, scale=1.0)} == {B}
  traced = _sample(sampler, scale=jnp.float32(1.0))
  np.testing.assert_allclose(traced, unguided, atol=1e-5)
  assert np.abs(_sample(sampler, scale=2.0) - unguided).min() > 0.1


def test_scale_zero_is_the_null_model():
  null = _sample(scale=0.0)
  for row, start in zip(null, X, strict=True):
    # Without a pull the flow scales the start, by one factor for all.
    np.testing.assert_allclose(row / start, (null / X).mean(), rtol=1e-4)


@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_guidance_acts_on_the_last_step_and_all_channels(sampler):
  grid = samplers.time_grid(sampler, 5)
  interval = (0.0, float(grid[-2]))
  plain = _sample(sampler, scale=1.0)
  end = _sample(sampler, scale=3.0, interval=interval)
  # Class k pulls with velocity k everywhere, so guidance adds 2 k dt; the SDE
  # adds as much again through the score, (v - t s) dt.
  dt = grid[-1] - grid[-2]
  gain = 2 * dt * np.asarray(LABELS)[:, None, None]
  if sampler == 'sde':
    gain = gain * (1 + (1 - grid[-2]))
  if sampler == 'heun':  # the corrector starts from the moved state
    gain = gain * (1 + dt / 2)
  np.testing.assert_allclose(
    end - plain, np.broadcast_to(gain, X.shape), rtol=1e-4
  )


def test_segments_are_scans_of_their_own():
  def scans(**kwargs):
    return str(jax.make_jaxpr(lambda: _sample('sde', **kwargs))()).count(
      ' scan['
    )

  assert scans(scale=1.0) == 1
  assert scans(scale=2.0) == 1
  assert scans(scale=2.0, interval=(0.0, 0.7)) == 2
  assert scans(scale=2.0, interval=(0.3, 0.7)) == 3


@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_one_program_serves_a_sweep_of_scales_and_intervals(sampler):
  traces = []
  # Heun ends with a step of another kind.
  options = {'final_step': 'euler'} if sampler == 'heun' else {}

  @jax.jit
  def run(scale, interval):
    traces.append(scale)
    return _sample(sampler, scale=scale, interval=interval, **options)

  intervals = (0.0, 1.0), (0.2, 0.9), (0.0, 0.5), (0.7, 1.0), (0.3, 0.3)
  swept = []
  for scale, interval in itertools.product((1.5, 4.0), intervals):
    static = _sample(sampler, scale=scale, interval=interval, **options)
    np.testing.assert_allclose(
      run(scale, interval), static, rtol=1e-5, atol=1e-5
    )
    swept.append(static)
  assert len(traces) == 1
  # Each of them is something else, but where guidance meets no step.
  ends = {static.tobytes() for static in map(np.asarray, swept)}
  assert len(ends) == len(swept) - 1


def test_states_of_a_traced_interval_cannot_be_recorded():
  def run(low):
    return _sample(scale=2.0, interval=(low, 1.0), record=True)

  with pytest.raises(ValueError, match='an interval that is known'):
    jax.jit(run)(0.5)


def test_samples_depend_on_no_split_into_batches_or_devices():
  @jax.jit
  def run(indices):
    x, steps = samplers.make_noise(11, indices, (2, 4))
    return guidance.sample(
      velocity,
      x,
      indices % 5,
      null_label=NULL,
      scale=2.0,
      interval=(0.0, 0.85),
      num_steps=6,
      path=path_lib.PATHS['linear'],
      noise=steps,
    )

  indices = jnp.arange(16)
  whole = run(indices)
  parts = [run(part) for part in jnp.split(indices, 2)]
  np.testing.assert_allclose(whole, np.concatenate(parts), atol=5e-6)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  spread = run(jax.device_put(indices, spec))
  np.testing.assert_allclose(whole, spread, atol=5e-6)


def test_own_grids_pass_through():
  times = np.linspace(1, 0, 9)
  sampled = _sample('heun', times=times, record=True)
  assert sampled.shape == (9, *X.shape)
  np.testing.assert_array_equal(
    sampled[-1], _sample('heun', num_steps=len(times) - 1)
  )


@pytest.mark.parametrize('interval', [(0.8, 0.2), (-0.1, 1.0), (0.0, 2.0)])
def test_impossible_intervals_are_refused(interval):
  with pytest.raises(errors.UserError, match='low <= high'):
    _sample(scale=2.0, interval=interval)


def test_default_options_sample_by_the_sde():
  run = functools.partial(_sample, 'sde', num_steps=4)
  np.testing.assert_array_equal(run(), run(diffusion='2t', last_step=0.04))
  assert np.abs(run() - run(last_step=0.2)).max() > 1e-2


STATE = {'tokens': X, 'cls': X[:, 0, :3]}


def tree_velocity(x, t, labels):
  """Each stream as `velocity`, the class token also pulled by the tokens."""
  v = {name: velocity(leaf, t, labels) for name, leaf in x.items()}
  return {**v, 'cls': v['cls'] + jnp.mean(x['tokens'], axis=(1, 2))[:, None]}


def _sample_tree(sampler, **kwargs):
  options = {}
  if sampler == 'sde':
    options['noise'] = lambda i: jax.tree.map(lambda x: jnp.sin(x + i), STATE)
  return guidance.sample(
    tree_velocity,
    STATE,
    LABELS,
    sampler=sampler,
    **{'null_label': NULL, 'path': path_lib.PATHS['linear'], 'num_steps': 5}
    | options
    | kwargs,
  )


@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_both_streams_of_a_state_move(sampler):
  plain = _sample_tree(sampler)
  assert jax.tree.structure(plain) == jax.tree.structure(STATE)
  # The tokens are those of a state without a class token.
  np.testing.assert_allclose(
    plain['tokens'], _sample(sampler, num_steps=5), atol=1e-6
  )
  moved = np.abs(plain['cls'] - STATE['cls'])
  assert moved.min() > 1e-3


@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_streams_may_have_scales_of_their_own(sampler):
  plain, both, tokens_alone = (
    _sample_tree(sampler, scale=scale)
    for scale in (1.0, 3.0, {'tokens': 3.0, 'cls': 1.0})
  )
  np.testing.assert_allclose(tokens_alone['tokens'], both['tokens'], rtol=1e-5)
  assert np.abs(both['tokens'] - plain['tokens']).min() > 0.1
  assert np.abs(both['cls'] - tokens_alone['cls']).min() > 0.1
  # Its own label pulls it no further, the guided tokens do.
  assert np.abs(tokens_alone['cls'] - plain['cls']).max() > 1e-3


@pytest.mark.parametrize('sampler', sorted(samplers.SAMPLERS))
def test_guidance_acts_on_the_class_token_in_the_last_step(sampler):
  interval = (0.0, float(samplers.time_grid(sampler, 5)[-2]))
  plain, end = (
    _sample_tree(sampler, scale=s, interval=interval) for s in (1.0, 3.0)
  )
  for name in STATE:
    assert np.abs(end[name] - plain[name]).min() > 1e-3


def test_channels_may_have_scales_of_their_own():
  scale = jnp.array([3.0, 3.0, 3.0, 1.0])
  plain, some, every = (_sample(scale=s) for s in (1.0, scale, 3.0))
  np.testing.assert_allclose(some[..., :3], every[..., :3], rtol=1e-5)
  np.testing.assert_allclose(some[..., 3], plain[..., 3], rtol=1e-5)
