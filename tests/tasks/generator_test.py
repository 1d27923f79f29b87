import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.models import sit
from selfboottok_jax.tasks import generator
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.tasks import tokenizers

K, E, CLASSES = tiny.TOKENIZER['num_tokens'], tiny.TOKENIZER['token_dim'], 3


@pytest.fixture(scope='module')
def codes():
  rng = np.random.default_rng(0)
  scale, shift = np.array([1.0, 2, 3, 4]), np.array([0.0, 1, -1, 5])
  return (rng.normal(size=(50, K, E)) * scale + shift).astype(np.float32)


@pytest.mark.parametrize('kind', generator.STATISTICS)
def test_statistics_against_numpy(codes, kind):
  axes = (0, 1) if kind == 'channel' else None
  # Batches of unequal size weigh by their images.
  batches = (codes[i:j] for i, j in ((0, 32), (32, 49), (49, 50)))
  measured = generator.measure_latents(batches, kind)
  for name, function in (('mean', np.mean), ('std', np.std)):
    assert measured[name].shape == (E,)
    assert measured[name].dtype == np.float32
    expected = function(codes.astype(np.float64), axis=axes)
    np.testing.assert_allclose(
      measured[name], np.broadcast_to(expected, (E,)), rtol=1e-5
    )


def test_a_dead_channel_does_not_divide_by_zero():
  measured = generator.measure_latents([np.zeros((4, K, E))], 'channel')
  assert np.all(measured['std'] > 0)


def test_normalise_and_back(codes):
  measured = generator.measure_latents([codes], 'channel')
  x = generator.normalise(jnp.asarray(codes), measured)
  np.testing.assert_allclose(np.mean(x, axis=(0, 1)), 0.0, atol=1e-5)
  np.testing.assert_allclose(np.std(x, axis=(0, 1)), 1.0, rtol=1e-4)
  back = generator.denormalise(x, measured)
  np.testing.assert_allclose(back, codes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'path': 'straight'}, 'loss.path'),
    ({'latent_statistics': 'token'}, 'loss.latent_statistics'),
    ({'statistics_images': 0}, 'loss.statistics_images'),
  ],
)
def test_choices_that_nobody_knows(fields, named):
  with pytest.raises(errors.ConfigError, match=f'{named}=.*wanted'):
    generator.Objective(**fields)


@pytest.fixture(scope='module')
def tokenizer_params():
  model = tiny.make_tokenizer()
  return jax.jit(model.init)(jax.random.key(0), tiny.images(1))['params']


def _task(tokenizer_params, **objective):
  model = sit.SiT(
    num_tokens=K, token_dim=E, num_classes=CLASSES, width=16, depth=1, heads=2
  )
  return generator.GeneratorTask(
    model,
    generator.Objective(**objective),
    tiny.make_tokenizer(),
    tokenizer_params,
  )


@pytest.fixture(scope='module')
def history(tokenizer_params):
  task = _task(tokenizer_params)
  step_fn = tokenizers.make_step(task, steps=100)
  batch = {'image': tiny.images(32), 'label': jnp.arange(32) % CLASSES}
  state = tokenizers.init_state(task, steps=100)
  codes = task.tokenizer.apply(
    {'params': tokenizer_params}, batch['image'], method='encode'
  )
  latents = generator.measure_latents([np.asarray(codes)], 'scalar')
  start = state.replace(stats={'latents': jax.tree.map(jnp.asarray, latents)})
  state, losses = start, []
  for _ in range(60):
    state, metrics = step_fn(state, task.frozen, batch)
    losses.append(float(metrics['loss']))
  return task, start, state, losses


def test_loss_starts_at_the_power_of_the_target_and_falls(history):
  _, _, _, losses = history
  # A fresh SiT says 0; target noise - x has power 2 for unit codes.
  np.testing.assert_allclose(losses[0], 2.0, rtol=0.15)
  assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])


def test_the_tokenizer_is_no_part_of_the_state(history):
  task, start, state, _ = history
  assert set(state.params) == set(state.ema) == set(state.opt) == {'generator'}
  assert set(task.frozen['tokenizer']) == {'encoder', 'quantizer_global'}
  tiny.assert_same(state.stats, start.stats)
  assert tiny.changed(state.params, start.params)


def test_statistics_are_placeholders_until_they_are_measured(history):
  task, _, _, _ = history
  _, stats = jax.jit(task.init)(jax.random.key(0))
  np.testing.assert_array_equal(stats['latents']['mean'], np.zeros(E))
  np.testing.assert_array_equal(stats['latents']['std'], np.ones(E))


@pytest.mark.parametrize('path', list(path_lib.PATHS))
def test_loss_is_finite_on_every_path(tokenizer_params, path):
  task = _task(tokenizer_params, path=path)
  state = tokenizers.init_state(task)

  @jax.jit
  def loss(rng):
    inputs = state_lib.LossInputs(
      params=state.params,
      frozen=task.frozen,
      batch={'image': tiny.images(8), 'label': jnp.zeros(8, jnp.int32)},
      stats=state.stats,
      carry={},
      step=jnp.int32(0),
      rng=rng,
    )
    return task.losses(0)['generator'](state.params['generator'], inputs)[0]

  values = [float(loss(jax.random.key(seed))) for seed in (0, 0, 1)]
  assert np.all(np.isfinite(values))
  assert values[0] == values[1] != values[2]
