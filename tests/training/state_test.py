import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfboottok_jax.training import optim
from selfboottok_jax.training import state as state_lib
from tests import tiny

LIMIT, RATE, SEED, STEPS = 0.5, 0.1, 3, 6


def _plain_sgd():
  """Rate times gradient, so that every update can be said in one line."""
  return optim.Optimizer(optax.identity(), lambda step: jnp.float32(RATE))


def _first(trained, inputs):
  """Pulls w to the batch; hands on what it saw."""
  loss = 0.5 * jnp.sum((trained['w'] - inputs.batch['x']) ** 2)
  return loss, state_lib.LossOutputs(
    metrics={'noise': jax.random.normal(inputs.rng)},
    stats=inputs.stats | {'count': inputs.stats['count'] + 1},
    carry={'w_before': trained['w']},
  )


def _second(trained, inputs):
  """Pulls v to the first group's w; tells what it was handed."""
  target = inputs.params['first']['w'] * inputs.frozen['scale']
  loss = 0.5 * jnp.sum((trained['v'] - target) ** 2)
  return loss, state_lib.LossOutputs(
    metrics={
      'seen_w': inputs.params['first']['w'][0],
      'carried_w': inputs.carry['w_before'][0],
      'seen_count': inputs.stats['count'],
      'other_noise': jax.random.normal(inputs.rng),
    },
    stats=inputs.stats | {'count': inputs.stats['count'] + 10},
    carry={},
  )


LOSSES = {'first': _first, 'second': _second}
OPTIMIZERS = {group: _plain_sgd() for group in LOSSES}
FROZEN = {'scale': jnp.float32(2.0)}


@pytest.fixture(scope='module')
def fresh():
  params = {
    'first': {'w': jnp.array([4.0, -1.0])},
    'second': {'v': jnp.array([1.0, 1.0])},
    'base': {'u': jnp.array([0.1, 0.3])},
  }
  return state_lib.init_state(
    params, {'count': jnp.zeros(())}, OPTIMIZERS, ('first', 'base')
  )


@pytest.fixture(scope='module')
def step_fn():
  return jax.jit(
    state_lib.make_train_step(LOSSES, OPTIMIZERS, seed=SEED, ema_limit=LIMIT)
  )


def _batch(step):
  return {'x': jnp.array([1.0, 2.0]) * step}


@pytest.fixture(scope='module')
def history(fresh, step_fn):
  """States and metrics of a few steps, the fresh state first."""
  states, metrics = [fresh], []
  for step in range(STEPS):
    state, values = step_fn(states[-1], FROZEN, _batch(step))
    states.append(state)
    metrics.append(values)
  return states, metrics


def test_starts_at_zero_with_means_that_are_copies(fresh):
  assert fresh.step == 0
  tiny.assert_same(fresh.ema['first'], fresh.params['first'])
  # Not the same buffers: the step donates its state.
  assert fresh.ema['first']['w'] is not fresh.params['first']['w']
  assert set(fresh.ema) == {'first', 'base'}
  assert set(fresh.opt) == set(LOSSES)


def test_groups_are_updated_in_order_against_the_newest(history):
  states, metrics = history
  w, v = np.array([4.0, -1.0]), np.array([1.0, 1.0])
  for step in range(STEPS):
    before = w
    w = w - RATE * (w - np.array([1.0, 2.0]) * step)
    v = v - RATE * (v - 2.0 * w)
    state, values = states[step + 1], metrics[step]
    np.testing.assert_allclose(state.params['first']['w'], w, rtol=1e-5)
    np.testing.assert_allclose(state.params['second']['v'], v, rtol=1e-5)
    np.testing.assert_allclose(values['seen_w'], w[0], rtol=1e-5)
    np.testing.assert_allclose(values['carried_w'], before[0], rtol=1e-5)
    assert int(state.step) == step + 1


def test_statistics_pass_through_the_groups(history):
  states, metrics = history
  for step in range(STEPS):
    assert metrics[step]['seen_count'] == 11 * step + 1
    assert states[step + 1].stats['count'] == 11 * (step + 1)


def test_a_group_without_a_loss_stays_bit_for_bit(history):
  states, _ = history
  tiny.assert_same(states[-1].params['base'], states[0].params['base'])
  tiny.assert_same(states[-1].ema['base'], states[0].params['base'])


def test_running_means_against_a_plain_loop(history):
  states, _ = history
  mean = np.asarray(states[0].params['first']['w'], np.float64)
  decays = []
  for step in range(STEPS):
    decay = min(LIMIT, (1 + step) / (10 + step))
    decays.append(decay)
    new = np.asarray(states[step + 1].params['first']['w'], np.float64)
    mean = decay * mean + (1 - decay) * new
    np.testing.assert_allclose(
      states[step + 1].ema['first']['w'], mean, rtol=1e-5
    )
  assert decays[0] == 0.1
  assert state_lib.ema_decay(jnp.int32(1000), LIMIT) == LIMIT
  np.testing.assert_allclose(
    state_lib.ema_decay(jnp.int32(90), 0.9999), 0.91, rtol=1e-6
  )


def test_metrics_name_losses_gradients_and_rate(history):
  _, metrics = history
  values = metrics[0]
  np.testing.assert_allclose(values['loss'], 0.5 * 17.0)
  np.testing.assert_allclose(values['first_grad_norm'], np.sqrt(17.0))
  np.testing.assert_allclose(values['learning_rate'], RATE)
  assert {'second_loss', 'second_grad_norm'} <= set(values)
  assert 'first_loss' not in values


def test_randomness_is_a_function_of_seed_step_and_group(
  history, fresh, step_fn
):
  states, metrics = history
  again, values = step_fn(states[2], FROZEN, _batch(2))
  tiny.assert_same(again, states[3])
  assert values['noise'] == metrics[2]['noise']
  step_key = jax.random.fold_in(jax.random.key(SEED), 2)
  for index, name in enumerate(('noise', 'other_noise')):
    expected = jax.random.normal(jax.random.fold_in(step_key, index))
    np.testing.assert_allclose(values[name], expected, rtol=1e-5)
  drawn = [float(m[name]) for m in metrics for name in ('noise', 'other_noise')]
  assert len(set(drawn)) == 2 * STEPS


PARTS = 4


def _mean_of_images(trained, inputs):
  """A mean over images; hands on each one's error, and counts its calls."""
  error = inputs.batch['x'] @ trained['w'] - inputs.batch['y']
  noise = jax.random.normal(inputs.rng)
  return jnp.mean(error**2), state_lib.LossOutputs(
    metrics={'error': jnp.mean(error), 'noise': noise},
    stats={'last': error[-1], 'calls': inputs.stats['calls'] + 1},
    carry={'error': error},
  )


def _mean_of_errors(trained, inputs):
  """Fits the errors that the first group hands on to the same images."""
  gap = inputs.batch['x'] @ trained['v'] - inputs.carry['error']
  return jnp.mean(gap**2), state_lib.LossOutputs(
    metrics={}, stats=inputs.stats, carry={}
  )


def _after_images(parts):
  """State and metrics after a step on 8 images in so many parts."""
  rng = np.random.default_rng(0)
  batch = {
    'x': rng.normal(size=(8, 3)).astype(np.float32),
    'y': rng.normal(size=8).astype(np.float32),
  }
  state = state_lib.init_state(
    {'first': {'w': jnp.ones(3)}, 'second': {'v': jnp.ones(3)}},
    {'last': jnp.zeros(()), 'calls': jnp.zeros((), jnp.int32)},
    OPTIMIZERS,
    (),
  )
  losses = {'first': _mean_of_images, 'second': _mean_of_errors}
  step = state_lib.make_train_step(
    losses, OPTIMIZERS, seed=SEED, ema_limit=LIMIT, accumulate=parts
  )
  return (*jax.jit(step)(state, {}, batch), batch)


def test_micro_batches_give_the_gradient_of_the_whole():
  (whole, expected, batch), (cut, metrics, _) = (
    _after_images(parts) for parts in (1, PARTS)
  )
  for group in ('first', 'second'):
    for new, old in zip(
      jax.tree.leaves(cut.params[group]),
      jax.tree.leaves(whole.params[group]),
      strict=True,
    ):
      np.testing.assert_allclose(new, old, rtol=1e-6)
  for name in ('loss', 'second_loss', 'error', 'first_grad_norm'):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
  # One update, but statistics have seen one part after the other.
  assert int(cut.step) == 1
  assert int(cut.stats['calls']) == PARTS * int(whole.stats['calls']) == PARTS
  error = batch['x'] @ np.ones(3, np.float32) - batch['y']
  np.testing.assert_allclose(cut.stats['last'], error[-1], rtol=1e-5)


def test_every_micro_batch_draws_for_itself():
  _, metrics, _ = _after_images(PARTS)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 0), 0)
  drawn = [
    jax.random.normal(jax.random.fold_in(key, part)) for part in range(PARTS)
  ]
  assert len({float(value) for value in drawn}) == PARTS
  np.testing.assert_allclose(metrics['noise'], np.mean(drawn), rtol=1e-5)
