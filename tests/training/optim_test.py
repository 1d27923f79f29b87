import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.training import optim

STEPS = 100


def _rates(**fields):
  optimizer = optim.build_optimizer(
    steps=STEPS, learning_rate=2.0, warmup=0.1, final=0.25, **fields
  )
  return np.asarray(jax.vmap(optimizer.schedule)(jnp.arange(STEPS + 20)))


def test_cosine_after_a_linear_warm_up():
  rates = _rates(schedule='cosine')
  now = np.arange(STEPS + 20)
  rise = np.minimum(1.0, 0.1 + 0.9 * now / 10)
  progress = np.clip((now - 10) / 90, 0, 1)
  wave = 0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * progress))
  np.testing.assert_allclose(rates, 2.0 * rise * wave, rtol=1e-5)
  np.testing.assert_allclose(rates[[0, 10, 100]], [0.2, 2.0, 0.5], rtol=1e-5)
  # Past the end the rate stays where it ended.
  np.testing.assert_allclose(rates[-1], rates[STEPS])


def test_constant_after_the_warm_up():
  rates = _rates(schedule='constant')
  np.testing.assert_allclose(rates[[0, 5, 10, 119]], [0.2, 1.1, 2.0, 2.0])


def test_without_warm_up_the_first_rates_are_whole():
  optimizer = optim.build_optimizer(
    steps=STEPS, learning_rate=2.0, schedule='constant', warmup=0.0
  )
  for step in (0, 1, STEPS):
    np.testing.assert_allclose(optimizer.schedule(jnp.int32(step)), 2.0)


def test_unknown_schedule():
  with pytest.raises(errors.ConfigError, match='linear.*cosine, constant'):
    optim.build_optimizer(steps=1, learning_rate=1.0, schedule='linear')


PARAMS = {'matrix': jnp.full((2, 2), 3.0), 'bias': jnp.full((2,), 3.0)}


def _update(grads, *, params=None, step=STEPS, **fields):
  params = PARAMS if params is None else params
  optimizer = optim.build_optimizer(
    steps=STEPS, learning_rate=0.5, schedule='constant', **fields
  )
  run = jax.jit(functools.partial(optim.update, optimizer))
  return run(grads, optimizer.transform.init(params), params, jnp.int32(step))


def test_first_step_of_adam_is_the_rate_times_the_sign():
  grads = {'matrix': jnp.array([[1.0, -2.0], [0.5, 4.0]]), 'bias': jnp.ones(2)}
  params, _, rate = _update(grads)
  assert rate == 0.5
  for name, start in PARAMS.items():
    np.testing.assert_allclose(
      params[name], start - 0.5 * np.sign(grads[name]), rtol=1e-4
    )


def test_two_steps_against_adam_written_out():
  b1, b2, epsilon = 0.8, 0.6, 1e-3
  optimizer = optim.build_optimizer(
    steps=STEPS,
    learning_rate=0.5,
    schedule='constant',
    b1=b1,
    b2=b2,
    epsilon=epsilon,
    clip_norm=0.0,
  )
  x = {'x': jnp.array([1.0, -2.0])}
  state = optimizer.transform.init(x)
  expected, m, v = np.array([1.0, -2.0]), 0.0, 0.0
  update = jax.jit(functools.partial(optim.update, optimizer))
  for n, gradient in enumerate(([1.0, 3.0], [-0.5, 2.0]), start=1):
    g = np.array(gradient)
    x, state, _ = update({'x': jnp.asarray(g, jnp.float32)}, state, x, STEPS)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    direction = m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + epsilon)
    expected = expected - 0.5 * direction
    np.testing.assert_allclose(x['x'], expected, rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients():
  # A large epsilon makes Adam's direction tell the gradient's size.
  grads = {'matrix': jnp.full((2, 2), 3.0), 'bias': jnp.zeros(2)}
  fields = {'epsilon': 1e3}
  moved = {
    clip: PARAMS['matrix']
    - _update(grads, clip_norm=clip, **fields)[0]['matrix']
    for clip in (0.0, 1.0, 100.0)
  }
  np.testing.assert_allclose(moved[0.0] / moved[1.0], 6.0, rtol=0.01)
  np.testing.assert_allclose(moved[100.0], moved[0.0])


def test_weight_decay_is_for_kernels_alone():
  # Stacked blocks give biases a second axis.
  params = {
    'dense': {'kernel': jnp.full((2, 2), 3.0), 'bias': jnp.full(2, 3.0)},
    'blocks': {'kernel': jnp.ones((4, 2, 2)), 'bias': jnp.ones((4, 2))},
  }
  grads = jax.tree.map(jnp.zeros_like, params)
  decayed, _, _ = _update(grads, params=params, weight_decay=0.1)
  untouched, _, _ = _update(grads, params=params)
  for name, module in params.items():
    np.testing.assert_allclose(
      decayed[name]['kernel'], 0.95 * module['kernel'], rtol=1e-6
    )
    np.testing.assert_array_equal(decayed[name]['bias'], module['bias'])
    np.testing.assert_array_equal(untouched[name]['kernel'], module['kernel'])


@pytest.mark.parametrize(
  ('name', 'value', 'wanted'),
  [
    ('learning_rate', 0.0, 'a number above 0'),
    ('epsilon', 0.0, 'a number above 0'),
    ('warmup', 2.0, 'a number from 0 to 1'),
    ('final', -0.1, 'a number from 0 to 1'),
    ('b1', 1.0, 'a number from 0 to below 1'),
    ('b2', float('nan'), 'a number from 0 to below 1'),
    ('weight_decay', -1.0, '0 or more'),
    ('clip_norm', -1.0, '0 or more'),
    ('schedule', 'other', 'one of cosine, constant'),
  ],
)
def test_values_out_of_range_are_named(name, value, wanted):
  fields = {'steps': 10, 'learning_rate': 1e-4, name: value}
  message = rf'optimizer\.{name}={value!r}; wanted {wanted}'
  with pytest.raises(errors.ConfigError, match=message):
    optim.build_optimizer(**fields)
