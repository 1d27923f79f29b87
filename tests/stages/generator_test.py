import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.stages import generator, generator_stage
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.stages import generators, tokenizers

K, E, CLASSES = generators.K, generators.E, generators.CLASSES


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
  measured = generator_stage.measure_codes(batches, kind)
  for name, function in (('mean', np.mean), ('std', np.std)):
    assert measured[name].shape == (E,)
    assert measured[name].dtype == np.float32
    expected = function(codes.astype(np.float64), axis=axes)
    np.testing.assert_allclose(
      measured[name], np.broadcast_to(expected, (E,)), rtol=1e-5
    )


def test_a_dead_channel_does_not_divide_by_zero():
  measured = generator_stage.measure_codes([np.zeros((4, K, E))], 'channel')
  assert np.all(measured['std'] > 0)


def test_normalise_and_back(codes):
  measured = generator_stage.measure_codes([codes], 'channel')
  x = path_lib.normalise_codes(jnp.asarray(codes), measured)
  np.testing.assert_allclose(np.mean(x, axis=(0, 1)), 0.0, atol=1e-5)
  np.testing.assert_allclose(np.std(x, axis=(0, 1)), 1.0, rtol=1e-4)
  back = path_lib.denormalise_codes(x, measured)
  np.testing.assert_allclose(back, codes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'path': 'straight'}, 'loss.path'),
    ({'latent_statistics': 'token'}, 'loss.latent_statistics'),
    ({'statistics_images': -1}, 'loss.statistics_images'),
    ({'times': 'normal'}, 'loss.times'),
    ({'align_mode': 'each'}, 'loss.align_mode'),
  ],
)
def test_choices_that_nobody_knows(fields, named):
  with pytest.raises(errors.ConfigError, match=f'{named}=.*wanted'):
    generator.Objective(**fields)


@pytest.fixture(scope='module')
def tokenizer_params():
  return generators.tokenizer_params()


@pytest.fixture(scope='module')
def history(tokenizer_params):
  task = generators.plain_task(tokenizer_params)
  step_fn = tokenizers.make_step(task, steps=100)
  batch = {'image': tiny.images(32), 'label': jnp.arange(32) % CLASSES}
  state = tokenizers.init_state(task, steps=100)
  codes = jax.jit(task.encode)(task.frozen, batch)['codes']
  latents = generator_stage.measure_codes([np.asarray(codes)], 'scalar')
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


def _batch(task, count=8):
  batch = {'image': tiny.images(count), 'label': jnp.arange(count) % CLASSES}
  if not task.frozen:
    encode = jax.jit(task.encoders)
    made = encode(task.encoders.params, batch.pop('image'))
    batch |= made
  return batch


def _loss(task):
  """The loss and its metrics, by key."""
  state = tokenizers.make_up_state(task)

  @jax.jit
  def loss(rng, frozen, batch):
    inputs = state_lib.LossInputs(
      params=state.params,
      frozen=frozen,
      batch=batch,
      stats=state.stats,
      carry={},
      step=jnp.int32(0),
      rng=rng,
    )
    value, outputs = task.losses(0)['generator'](
      state.params['generator'], inputs
    )
    return value, outputs.metrics

  return lambda seed: loss(jax.random.key(seed), task.frozen, _batch(task))


@pytest.mark.parametrize(
  ('path', 'times'),
  [
    pytest.param(
      path,
      times,
      # Each path and each distribution of times once.
      marks=pytest.mark.slow if times == 'uniform' and path != 'linear' else (),
    )
    for path in path_lib.PATHS
    for times in path_lib.TIMES
  ],
)
def test_loss_is_finite_on_every_path(tokenizer_params, path, times):
  task = generators.plain_task(
    tokenizer_params, path=path, times=times, velocity_cosine=1.0
  )
  loss = _loss(task)
  values = [float(loss(seed)[0]) for seed in (0, 0, 1)]
  assert np.all(np.isfinite(values))
  assert values[0] == values[1] != values[2]


def test_reg_is_the_weighted_sum_of_its_terms(tokenizer_params):
  task = generators.make_task(
    tokenizer_params, cls=0.3, align=0.7, velocity_cosine=0.2
  )
  value, logged = _loss(task)(0)
  terms = {name.removeprefix('loss/'): term for name, term in logged.items()}
  assert set(terms) == {'velocity', 'cosine', 'cls', 'alignment'}
  weights = {'velocity': 1, 'cosine': 0.2, 'cls': 0.3, 'alignment': 0.7}
  np.testing.assert_allclose(
    value, sum(weights[k] * terms[k] for k in terms), rtol=1e-6
  )
  assert -1 <= terms['alignment'] <= 1
  assert 0 <= terms['cosine'] <= 2


@pytest.mark.parametrize(
  ('mode', 'terms'),
  [
    ('repeat', {'velocity', 'cls', 'alignment'}),
    *(
      pytest.param(
        mode, {'velocity', 'cls', 'alignment'}, marks=pytest.mark.slow
      )
      for mode in ('pool', 'global', 'cls_only')
    ),
    ('off', {'velocity', 'cls'}),
  ],
)
def test_five_modes_of_alignment(tokenizer_params, mode, terms):
  task = generators.make_task(tokenizer_params, align_mode=mode)
  value, found = _loss(task)(0)
  assert set(found) == {f'loss/{term}' for term in terms}
  assert np.isfinite(value)
  params = jax.eval_shape(task.init, jax.random.key(0))[0]['generator']
  assert ('projector' in params) == (mode != 'off')


def test_streams_share_times_and_have_noise_of_their_own(tokenizer_params):
  task = generators.make_task(tokenizer_params)
  seen = []

  def interpolate(x, noise, t):
    seen.append((np.asarray(noise), np.asarray(t)))
    return path_lib.PATHS['linear'].interpolate(x, noise, t)

  task.path = types.SimpleNamespace(
    interpolate=interpolate, velocity=path_lib.PATHS['linear'].velocity
  )
  params, stats = tiny.noise_for(task.init, jax.random.key(0))
  task.terms(
    params['generator'],
    jax.jit(task.encode)(task.frozen, _batch(task)),
    jnp.zeros(8, jnp.int32),
    jnp.linspace(0.1, 0.9, 8),
    jax.random.key(0),
    stats['latents'],
    train=False,
  )
  (one, t), (other, same_t) = seen
  np.testing.assert_array_equal(t, same_t)
  assert {one.shape[-1], other.shape[-1]} == {E, task.model.cls_dim}
  assert not np.intersect1d(one, other).size
  # Nor do images of a batch share theirs.
  assert len(np.unique(one)) == one.size


@pytest.mark.parametrize(
  'mode', ['repeat', pytest.param('global', marks=pytest.mark.slow)]
)
def test_cached_batches_give_the_same_loss(tokenizer_params, mode):
  online = generators.make_task(tokenizer_params, align_mode=mode)
  cached = generators.make_task(tokenizer_params, align_mode=mode, cached=True)
  assert cached.frozen == {}
  assert set(cached.example) == {'codes', 'cls', 'targets', 'label'}
  for seed in (0, 1):
    (a, in_a), (b, in_b) = (_loss(task)(seed) for task in (online, cached))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for name, term in in_a.items():
      np.testing.assert_allclose(term, in_b[name], rtol=1e-5, atol=1e-6)


def test_frozen_networks_are_components(tokenizer_params):
  task = generators.make_task(tokenizer_params)
  params = tiny.noise_for(task.init, jax.random.key(0))[0]
  frozen = [c.name for c in task.components(params) if not c.trained]
  assert frozen == ['tokenizer', 'teacher']


def test_a_depth_beyond_the_network_is_refused(tokenizer_params):
  with pytest.raises(errors.ConfigError, match='align_depth=3; wanted 1 to'):
    generators.make_task(tokenizer_params, model={'align_depth': 3})
  with pytest.raises(errors.ConfigError, match='cls_only aligns the class'):
    generators.make_task(tokenizer_params, has_cls=False, align_mode='cls_only')


def test_blocks_are_cut_where_the_model_has_them(tokenizer_params):
  model = {'depth': 3, 'align_depth': 2}
  plain = generators.plain_task(tokenizer_params, model=model)
  reg = generators.make_task(tokenizer_params, model=model)
  params, wanted = (
    jax.device_get(tiny.noise_for(task.init, jax.random.key(0))[0]['generator'])
    for task in (plain, reg)
  )
  cut = generator.cut_blocks(params, reg.model)
  assert set(wanted) - set(cut) <= set(generator.MAY_START_FRESH)
  for name in ('blocks_0', 'blocks_2'):
    assert jax.tree.map(np.shape, cut[name]) == jax.tree.map(
      np.shape, wanted[name]
    )
  tiny.assert_same(generator.cut_blocks(cut, plain.model), params)


@pytest.mark.slow
def test_bytes_train_as_the_floats_that_they_stand_for(tokenizer_params):
  # With a teacher, which sees the same floats as the tokenizer.
  task = generators.make_task(tokenizer_params)
  bytes_, floats = tokenizers.train_twice(task)
  tiny.assert_same(bytes_, floats)
