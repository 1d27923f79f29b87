"""Paths, conversions and losses against SiT's and REG's records."""

import jax.numpy as jnp
import pytest

from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import samplers
from selfboottok_jax.objectives import velocity
from tests.golden import fixtures

pytestmark = pytest.mark.golden

SIT_PATHS = {'Linear': 'linear', 'GVP': 'cosine', 'VP': 'vp'}


def _names(fixture, suffix):
  """Path names in keys out.<name>.<suffix>."""
  names = [
    key.split('.')[1]
    for key in fixture.arrays
    if key.startswith('out.') and key.endswith(f'.{suffix}')
  ]
  assert names
  return names


def test_sit_transport():
  name = 'sit_transport'
  fixture = fixtures.load('generator', name)
  arrays = {
    k: jnp.asarray(v) for k, v in fixture.arrays.items() if v.dtype.kind == 'f'
  }
  data, noise = arrays['in.data'], arrays['in.noise']
  # Their velocity has the other sign.
  t, v = path_lib.swap_convention(arrays['in.t'], arrays['in.model_out'])
  for theirs in _names(fixture, 'alpha'):
    path = path_lib.PATHS[SIT_PATHS[theirs]]
    state = path.interpolate(data, noise, t)
    target = path.velocity(data, noise, t)
    w = samplers.DIFFUSIONS['sigma'](path, t)
    # The record is norm w / 2; its constant form is the norm itself.
    norm = arrays[f'out.{theirs}.diffusion.constant']
    for array, actual in (
      ('alpha', path.alpha(t)),
      ('sigma', path.sigma(t)),
      ('d_alpha', -path.d_alpha(t)),
      ('d_sigma', -path.d_sigma(t)),
      ('xt', state),
      ('ut', -target),
      ('score_from_velocity', path.score_from_velocity(v, state, t)),
      (
        'score_of_true_velocity',
        path.score_from_velocity(target, state, t),
      ),
      ('noise_from_velocity', path.noise_from_velocity(v, state, t)),
      ('data_from_velocity', path.data_from_velocity(v, state, t)),
      ('diffusion.sigma', norm * w / 2),
      ('loss.velocity.None', _loss(fixture, theirs, path, arrays)),
    ):
      key = f'out.{theirs}.{array}'
      fixtures.check(name, key, actual, arrays[key])


def _loss(fixture, theirs, path, arrays):
  """Their training maps uniform times to the interval of the path."""
  (row,) = [
    i
    for i, config in enumerate(fixture.arrays['out.interval.names'])
    if config == f'{theirs}|velocity|eval=0|sde=0|SBDM|last=0.0'
  ]
  low, high = fixture.arrays['out.interval.t0t1'][row]
  assert high == pytest.approx(1 - path.min_time, abs=1e-12)
  s = arrays['in.t'] * (high - low) + low
  t, v = path_lib.swap_convention(s, arrays['in.model_out'])
  return velocity.velocity_loss(
    v, arrays['in.data'], arrays['in.noise'], t, path
  )


def test_reg_convention():
  name = 'reg_convention'
  fixture = fixtures.load('generator', name)
  arrays = {k: jnp.asarray(v) for k, v in fixture.arrays.items()}
  t, x, v = (arrays[f'in.{k}'] for k in 'txv')
  data, noise = arrays['in.data'], arrays['in.noise']
  for path_name in _names(fixture, 'target'):
    path = path_lib.PATHS[path_name]
    found = {
      'alpha': path.alpha(t),
      'sigma': path.sigma(t),
      'xt': path.interpolate(data, noise, t),
      'target': path.velocity(data, noise, t),
      'score': path.score_from_velocity(v, x, t),
      'data_pred': path.data_from_velocity(v, x, t),
      'noise_pred': path.noise_from_velocity(v, x, t),
    }
    for array, actual in found.items():
      key = f'out.{path_name}.{array}'
      if key in arrays:
        fixtures.check(name, key, actual, arrays[key])
    key = f'out.{path_name}.score_via_sit'
    if key in arrays:
      tail = found['score'][-len(arrays[key]) :]
      fixtures.check(name, key, tail, arrays[key])
  w = samplers.DIFFUSIONS['2t'](path_lib.PATHS['linear'], t)
  fixtures.check(name, 'out.diffusion', w, arrays['out.diffusion'])
