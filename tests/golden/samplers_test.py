"""Samplers and guidance against REPA's, SoftVQ's and SiT's records."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import guidance, samplers
from selfboottok_jax.flow import path as path_lib
from tests.golden import analytic, fixtures, sit_weights

pytestmark = pytest.mark.golden

# REPA's Heun ends with an Euler step.
REPA_KINDS = {
  'ode_euler': ('ode', 'linear', {}),
  'ode_heun': ('heun', 'linear', {'final_step': 'euler'}),
  'sde': ('sde', 'linear', {}),
  'sde_linear': ('sde', 'linear', {}),
  'sde_cosine': ('sde', 'cosine', {}),
}
# name -> (path, the time of theirs at which their ODE ends: VP's velocity is
# infinite at the data).
SIT_PATHS = {
  'Linear': ('linear', 1.0),
  'GVP': ('cosine', 1.0),
  'VP': ('vp', 0.999),
}


def _repa_kinds(fixture, case, suffix=''):
  """Kinds of sampler recorded for a case."""
  kinds = [k for k in REPA_KINDS if f'out.{k}.{case}{suffix}' in fixture.arrays]
  assert kinds
  return kinds


def _repa(fixture, kind, case, *, dtype, field=None, **kwargs):
  """One recorded case of REPA's samplers with the analytic field."""
  arrays = fixture.arrays
  sampler, path, options = REPA_KINDS[kind]
  path = path_lib.PATHS[path]
  _, scale, low, high = case
  if sampler == 'sde':
    steps = jnp.asarray(kwargs.pop('noise', arrays['in.noise']), dtype)
    options = {'noise': lambda i: steps[jnp.minimum(i, len(steps) - 1)]}
  return guidance.sample(
    field or analytic.from_fixture(fixture, path),
    jnp.asarray(arrays['in.x1'], dtype),
    jnp.asarray(arrays['in.y'].astype(np.int32)),
    null_label=fixture.meta['null'],
    scale=scale,
    interval=(low, high),
    sampler=sampler,
    path=path,
    **{'num_steps': fixture.meta['num_steps']} | options | kwargs,
  )


def test_repa_in_float64_with_every_call():
  name = 'sampler_repa'
  fixture = fixtures.load('generator', name)
  batch = len(fixture.arrays['in.y'])
  for case in fixture.meta['cases']:
    for kind in _repa_kinds(fixture, case[0], '.final'):
      path = path_lib.PATHS[REPA_KINDS[kind][1]]
      field = analytic.from_fixture(fixture, path, seen=[], batch=batch)
      with jax.enable_x64(True):
        run = functools.partial(
          _repa, fixture, kind, case, dtype=jnp.float64, field=field
        )
        x = jax.block_until_ready(jax.jit(run)())
        jax.effects_barrier()
      assert x.dtype == jnp.float64
      for array, actual in (
        ('final', x),
        ('calls_x', np.stack([x for x, _, _ in field.seen])),
        ('calls_t', np.array([t for _, t, _ in field.seen])),
        ('calls_batch', np.array([rows for _, _, rows in field.seen])),
      ):
        key = f'out.{kind}.{case[0]}.{array}'
        fixtures.check(name, key, actual, fixture.arrays[key])


def test_repa_in_float32():
  fixture = fixtures.load('generator', 'sampler_repa')
  for case in fixture.meta['cases']:
    for kind in _repa_kinds(fixture, case[0], '.final'):
      run = functools.partial(_repa, fixture, kind, case, dtype=jnp.float32)
      x = jax.jit(run)()
      assert x.dtype == jnp.float32
      want = fixture.arrays[f'out.{kind}.{case[0]}.final']
      fixtures.check('sampler_repa.float32', 'final', x, want)


def test_repa_long_sde():
  name = 'sampler_repa'
  fixture = fixtures.load('generator', name)
  arrays = fixture.arrays
  num_steps = len(arrays['in.noise250']) + 1
  run = functools.partial(
    _repa,
    fixture,
    'sde_linear',
    ('long', 2.0, 0.0, 0.85),  # guided as the record's description says
    num_steps=num_steps,
    noise=arrays['in.noise250'],
    record=True,
  )
  (key,) = [k for k in arrays if k.startswith('out.sde250.t_every')]
  stride = int(key.removeprefix('out.sde250.t_every'))
  times = samplers.time_grid('sde', num_steps)[:-1:stride]
  fixtures.check(name, key, times, arrays[key])
  with jax.enable_x64(True):
    states = jax.jit(functools.partial(run, dtype=jnp.float64))()
  key = f'out.sde250.x_every{stride}'
  fixtures.check(name, key, states[:-1:stride], arrays[key])
  fixtures.check(
    name, 'out.sde250.final', states[-1], arrays['out.sde250.final']
  )
  narrow = jax.jit(functools.partial(run, dtype=jnp.float32))()
  fixtures.check(
    'sampler_repa.float32', 'sde250', narrow[-1], arrays['out.sde250.final']
  )


def test_repa_errors_at_each_number_of_steps():
  name = 'sampler_repa'
  fixture = fixtures.load('generator', name)
  exact = fixture.arrays['out.exact_ode_nocfg']
  prefix, gaps = 'out.order.', {}
  keys = [key for key in fixture.arrays if key.startswith(prefix)]
  for key in keys:
    kind, steps = key.removeprefix(prefix).split('_')
    with jax.enable_x64(True):
      x = _repa(
        fixture,
        f'ode_{kind}',
        ('nocfg', 1.0, 0.0, 1.0),
        dtype=jnp.float64,
        num_steps=int(steps),
      )
    gaps[kind, int(steps)] = gap = np.abs(np.asarray(x) - exact).max()
    fixtures.check(name, key, gap, fixture.arrays[key])
  for (kind, steps), gap in gaps.items():
    if (kind, 2 * steps) in gaps:
      ratio = gap / gaps[kind, 2 * steps]
      order = {'euler': 2.0, 'heun': 4.0}[kind]
      assert 0.85 * order < ratio < 1.3 * order, (kind, steps, ratio)


def test_softvq_network():
  name = 'sampler_softvq_model'
  fixture = fixtures.load('generator', name)
  arrays, meta = fixture.arrays, fixture.meta
  model = sit_weights.build(meta['model_args'])
  params = sit_weights.convert(fixture.weights, meta['model_args']['depth'])
  labels = jnp.asarray(arrays['in.y'].astype(np.int32))
  noise = jnp.asarray(arrays['in.noise'])

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(kind, case):
    sampler, path, options = REPA_KINDS[kind]
    _, scale, low, high = case
    if sampler == 'sde':
      options = {'noise': lambda i: noise[jnp.minimum(i, len(noise) - 1)]}
    return guidance.sample(
      functools.partial(model.apply, params),
      jnp.asarray(arrays['in.x1']),
      labels,
      null_label=model.num_classes,
      scale=scale,
      interval=(low, high),
      sampler=sampler,
      num_steps=meta['num_steps'],
      path=path_lib.PATHS[path],
      **options,
    )

  for case in meta['cases']:
    for kind in _repa_kinds(fixture, case[0]):
      x = run(kind, tuple(case))
      key = f'out.{kind}.{case[0]}'
      fixtures.check(name, key, x, arrays[key])
      key = f'out.{kind}_denorm.{case[0]}'
      if key in arrays:
        latents = x * meta['latents_std'] + meta['latents_mean']
        fixtures.check(name, key, latents, arrays[key])


def test_sit():
  name = 'sampler_sit'
  fixture = fixtures.load('generator', name)
  num_states = fixture.meta['num_steps']
  noise = jnp.asarray(fixture.arrays['in.noise'])
  forms = {
    'ode.{}.euler': {'sampler': 'ode'},
    'ode.{}.heun2': {'sampler': 'heun', 'final_step': 'heun'},
    'sde.{}.Euler.sigma.Mean': {
      'sampler': 'sde',
      'diffusion': 'sigma',
      'noise': lambda i: noise[jnp.minimum(i, len(noise) - 1)],
    },
  }
  compared = 0
  for form, options in forms.items():
    for theirs, (path, end) in SIT_PATHS.items():
      key = 'out.' + form.format(theirs)
      if key not in fixture.arrays:
        continue
      # Their time grows from noise to data.
      times = 1 - np.linspace(0, end, num_states)
      if options['sampler'] == 'sde':
        times = samplers.time_grid('sde', num_states)
      states = _sit(fixture, path_lib.PATHS[path], times, options)
      # Their SDE does not keep the start.
      states = states[-num_states:]
      fixtures.check(name, key, states, fixture.arrays[key])
      compared += 1
  assert compared


def _sit(fixture, path, times, options):
  field = analytic.from_fixture(fixture, path)
  # There and back through their convention.
  labels = jnp.asarray(fixture.arrays['in.y'].astype(np.int32))
  theirs = path_lib.swap_velocity(lambda x, t: field(x, t, labels))

  def velocity(x, t, labels):
    del labels
    return path_lib.swap_velocity(theirs)(x, t)

  return guidance.sample(
    velocity,
    jnp.asarray(fixture.arrays['in.x0']),
    labels,
    null_label=fixture.meta['null'],
    path=path,
    times=times,
    record=True,
    **options,
  )
